"""A training that begins with a registered supernet, and one that learns from a registered model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.cli.main import main
from tests.pipelines import SPACE

pytestmark = [pytest.mark.server, pytest.mark.train, pytest.mark.slow]

DIGITS = ["supernet", "--data", "digits", "--max-train", "130", "--epochs", "1"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weights_of(version: int) -> dict[str, Any]:
    from foxnas_mlflow.flavor import SupernetModel, load_model

    model = load_model(f"models:/foxnas-supernet/{version}")
    assert isinstance(model, SupernetModel)
    return {name: values for name, values in model.weights.items() if "norm" not in name}


def log_teacher(answer: Any) -> str:
    import mlflow

    class Teacher(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
            return answer(model_input)

    with mlflow.start_run():
        uri: str = mlflow.pyfunc.log_model(name="teacher", python_model=Teacher(), pip_requirements=[]).model_uri
    return uri


def test_known_weights_teachers_and_weights_of_classes_reach_the_training(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from foxnas_mlflow.flavor import load_model

    space = tmp_path / "two.yaml"
    space.write_text(SPACE, encoding="utf-8")
    small = [*DIGITS, "--space", str(space)]
    assert main(small) == 0
    known = "models:/foxnas-supernet/1"
    # At this learning rate the weights stay what they were at the start.
    still = [*small, "--learning-rate", "1e-12", "--seed", "5", "--class-weights", "balanced"]
    assert main([*still, "--sampling", "balanced"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main([*still, "--init", known]) == 0
    for name, values in weights_of(1).items():
        np.testing.assert_allclose(weights_of(2)[name], values, atol=1e-6, err_msg=name)
    model: Any = load_model("models:/foxnas-supernet/2")
    assert model.config["init"] == known
    assert model.config["head_first"] > 0
    np.testing.assert_allclose(np.mean(model.config["class_weights"]), 1, atol=0.1)

    assert main([*small, "--teacher", known]) == 0
    capsys.readouterr()
    for wrong, told in (
        (lambda images: np.full((len(images), 7), 1 / 7), "each of the 10 classes"),
        (lambda images: np.full((len(images), 10), -2.0), "end the model with a softmax"),
    ):
        assert main([*small, "--teacher", log_teacher(wrong)]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert "Traceback" not in error
    assert main(["main", "--supernet", known, "--init", known]) == 2
    assert "supernet names a trained one" in capsys.readouterr().err


def test_a_teacher_of_other_classes_or_channels_is_refused_by_name(tracking: str) -> None:
    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.flavor import SupernetModel
    from foxnas_mlflow.tracking.teacher import open_teacher
    from tests.supernets import register_mini_supernet

    uri, digits = register_mini_supernet(), [str(i) for i in range(10)]
    assert isinstance(open_teacher(uri, labels=digits, channels=1), SupernetModel)
    for labels, channels, told in (
        (digits[:9], 1, "must have the 9 classes of the images; received 10"),
        ([*digits[:8], "9", "8"], 1, "classes of the images, in order; received '8' instead of '9'"),
        (digits, 3, f"images of 3 channels, as the training's are; received 1 channels in {uri}"),
    ):
        with pytest.raises(InvalidInputError, match=told):
            open_teacher(uri, labels=labels, channels=channels)


def test_a_supernet_teaches_with_statistics_of_its_largest_network(tracking: str) -> None:
    import torch

    from foxnas_mlflow.data import load_dataset
    from foxnas_mlflow.flavor import load_model
    from foxnas_mlflow.supernet import SubnetEvaluator, Supernet, Worker
    from foxnas_mlflow.workflows import SupernetRequest
    from foxnas_mlflow.workflows.supernet import _teacher
    from tests.supernets import MINI_SPACE, register_mini_supernet

    uri, dataset = register_mini_supernet(), load_dataset("digits", seed=3, max_train=400)
    teacher = _teacher(SupernetRequest(data="digits", teacher=uri, seed=3), dataset, Worker(0, 1, "cpu"))
    assert teacher is not None
    # Its running statistics are those of no network: 0 and 1.
    supernet = Supernet.from_weights(MINI_SPACE, load_model(uri).weights)
    expected = SubnetEvaluator(supernet, dataset).network(MINI_SPACE.largest())
    images = np.stack([dataset.preprocessing(16).resize(dataset.val[i]) for i in range(20)])
    x = torch.from_numpy(dataset.normalization(images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), expected(x).softmax(1), rtol=1e-3, atol=1e-4)


def test_a_network_of_pytorch_that_takes_no_bytes_is_refused_in_words(tracking: str) -> None:
    import torch

    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.tracking.teacher import AnsweringTeacher, open_teacher

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10), torch.nn.Softmax(1))
    uri = log_teacher(lambda images: network(torch.from_numpy(images)).detach().numpy())
    teacher = open_teacher(uri, labels=[str(i) for i in range(10)], channels=1)
    assert isinstance(teacher, AnsweringTeacher)
    with pytest.raises(InvalidInputError, match=r"a teacher must answer images given as an array .*; received models:"):
        teacher.answer(np.zeros((2, 16, 16, 1), np.uint8))
