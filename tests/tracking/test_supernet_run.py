"""A training as MLflow sees it, and trainings that are killed and go on."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.cli.main import main
from tests.pipelines import SPACE, Running
from tests.supernets import register_mini_supernet

pytestmark = [pytest.mark.server, pytest.mark.train, pytest.mark.slow]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def space(tmp_path: Path) -> str:
    """Path of a space whose networks have few layers."""
    path = tmp_path / "two.yaml"
    path.write_text(SPACE, encoding="utf-8")
    return str(path)


def test_a_training_logs_what_the_contract_names(
    tracking: str, cache: Path, space: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    from foxnas_mlflow.flavor import SupernetModel, load_model, model_id_of
    from foxnas_mlflow.supernet import SubnetEvaluator, Supernet

    command = ["supernet", "--data", "digits", "--space", space, "--max-train", "200", "--epochs", "2"]
    assert main([*command, "--ema", "0.9", "--seed", "3"]) == 0
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["foxnas.stage"] == "supernet"
    assert run.data.tags["foxnas.space"] == "two"
    for key in ("train/loss", "train/images_per_s", "eval/top1_max", "eval/top1_min", "eval/top1_random"):
        assert key in run.data.metrics
    # One value an epoch in so few, the last of them that of all images, at the step at which the training ended.
    history = {
        key: client.get_metric_history(run.info.run_id, key)
        for key in ("train/loss", "eval/top1_max", "eval/top1_min", "eval/top1_random")
    }
    n_steps = history["train/loss"][-1].step
    assert n_steps > 0
    for key in ("eval/top1_max", "eval/top1_min", "eval/top1_random"):
        assert [metric.step for metric in history[key]] == [n_steps // 2, n_steps]
    (data,) = run.inputs.dataset_inputs
    logged = client.get_logged_model(model_id_of(client.get_model_version("foxnas-supernet", "1")))
    final = {metric.key: metric for metric in logged.metrics}
    assert final["eval/top1_max"].step == n_steps
    assert final["eval/top1_max"].value == history["eval/top1_max"][-1].value
    assert (final["eval/top1_max"].dataset_name, final["eval/top1_max"].dataset_digest) == (
        "digits",
        data.dataset.digest,
    )
    assert data.dataset.name == "digits"
    assert 190 <= int(run.data.params["cfg.n_train"]) <= 200
    checkpoints = {a.path for a in client.list_artifacts(run.info.run_id, "checkpoint")}
    assert checkpoints <= {"checkpoint/a.safetensors", "checkpoint/b.safetensors"}
    assert checkpoints
    assert not list((cache / "foxnas_mlflow" / "checkpoints").iterdir())

    model = load_model("models:/foxnas-supernet/1")
    assert isinstance(model, SupernetModel)
    assert model.labels == tuple("0123456789")
    assert client.get_model_version("foxnas-supernet", "1").tags["weights"] == "trained"
    # The registered weights are those that were evaluated.
    from foxnas_mlflow.data import load_dataset

    dataset = load_dataset("digits", seed=3, max_train=200)
    evaluator = SubnetEvaluator(Supernet.from_weights(model.space, model.weights), dataset, seed=3)
    got = evaluator.evaluate(model.space.largest()).top1_percent
    np.testing.assert_allclose(got, model.config["metrics"]["eval/top1_max"], atol=1e-9)
    evaluation = evaluator.evaluate(model.space.largest())
    assert run.data.metrics["eval/balanced_accuracy_max"] == pytest.approx(evaluation.balanced_percent)
    assert run.data.metrics["eval/majority_share"] == pytest.approx(
        100 * np.bincount(dataset.val.targets).max() / len(dataset.val)
    )
    assert len(mlflow.load_table("tables/classes.json", run_ids=[run.info.run_id])) == 10
    assert "Next: foxnas sample --supernet models:/foxnas-supernet/1" in capsys.readouterr().out


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_training_is_killed_and_goes_on_from_its_run(
    tracking: str, cache: Path, space: str, signum: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    from foxnas_mlflow import get_space

    # The same words go on: what it began with is not asked for again, nor refused.
    begun_with = register_mini_supernet("other", get_space(space))
    command = ["supernet", "--data", "digits", "--space", space, "--max-train", "200", "--epochs", "3"]
    command += ["--init", begun_with]
    running = Running(command)
    client = mlflow.MlflowClient()
    deadline = time.monotonic() + 120
    while not any("train/loss" in run.data.metrics for run in client.search_runs(["0"])):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    status, said = running.interrupt(signum), "\n".join(running.lines)
    assert status == {signal.SIGTERM: 143, signal.SIGINT: 130}[signum], said
    assert "Traceback" not in said
    (killed,) = client.search_runs(["0"], "attributes.status = 'KILLED'")
    assert f"Its checkpoint is kept: the same command with --resume {killed.info.run_id} goes on." in said
    if signum == signal.SIGINT:
        return
    # The machine is lost with its disk: only the artifacts are left.
    for path in (cache / "foxnas_mlflow" / "checkpoints").glob("*/*"):
        path.unlink()
    assert main([*command, "--resume", killed.info.run_id]) == 0
    (resumed,) = client.search_runs(["0"], "tags.`foxnas.resumed_at_step` != ''")
    assert int(resumed.data.tags["foxnas.resumed_at_step"]) > 0
    assert resumed.info.status == "FINISHED"
    capsys.readouterr()
    for other, told in (
        (["--seed", "1", "--learning-rate", "0.5", "--augment", "yes", "--flip", "yes", "--ema", "0.5"],
         "received other augment, flip, seed, learning_rate, ema"),
        (["--space", "tpu"], "space"),
        (["--init", "timm:mobilenetv3_small_050"], "received other init"),
    ):  # fmt: skip
        assert main([*command, *other, "--resume", killed.info.run_id]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "/does/not/exist"], "path of a folder"),
        (["--resume", "/does/not/exist"], "id of a run"),
        (["--resume", "0" * 32], "id of a run"),
        (["--epochs", "-1"], "epochs must be 0 or more"),
        (["--preset", "huge"], "preset must be one of"),
        (["--ema", "1"], "ema must be at least 0 and below 1"),
        (["--max-train", "0.5"], "max_train must be an integer"),
        (["--learning-rate", "-1"], "learning_rate must be 0 or more"),
        (["--accumulate", "0"], "accumulate must be positive; received 0"),
        (["--max-train", "200", "--accumulate", "60"], "two images at least, for batch norm; the batch has 64"),
        (["--width-mult", "100"], "width_mult must be between"),
        (["--init", "/does/not/exist"], "the path of a checkpoint"),
        (["--init", "setup.cfg"], "the path of a checkpoint"),
    ],
)
def test_bad_input(tracking: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["supernet", "--data", "digits", *argv]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("foxnas:")]
    assert message in line


def test_a_space_too_small_for_its_strides_and_a_class_without_training_images_are_refused(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml
    from PIL import Image

    from foxnas_mlflow.core.space import CPU_SPACE

    values = CPU_SPACE.to_dict() | {"image_sizes": [16, 32]}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(values))
    for split, labels in {"train": "ab", "val": "abc"}.items():
        for label in labels:
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(3):
                Image.new("L", (8, 8), i).save(tmp_path / "data" / split / label / f"{i}.png")
    for argv, message in (
        (["--data", "digits", "--preset", "paper", "--space", str(tmp_path / "space.yaml")], "product of the strides"),
        (["--data", str(tmp_path / "data")], "class"),
    ):
        assert main(["supernet", *argv]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("foxnas:")]
        assert message in line


def test_once_for_all_weights_begin_a_training(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow
    import torch

    from foxnas_mlflow.flavor import load_model
    from tests.supernet.test_once_for_all import shapes_of, weights_of

    torch.save({"state_dict": weights_of(shapes_of("mbv3", 0.35))}, tmp_path / "net")
    argv = ["supernet", "--data", "digits", "--max-train", "200", "--epochs", "1", "--init", str(tmp_path / "net")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "once-for-all's MobileNetV3" in out
    assert "one input channel" in out
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.data.tags["foxnas.space"] == "cpu-tiny"
    # What goes on with it is from the same weights.
    assert main([*argv[:-2], "--resume", run.info.run_id]) == 0
    for version in "12":
        assert load_model(f"models:/foxnas-supernet/{version}").config["init"] == str(tmp_path / "net")
    # Weights of other blocks do not fit.
    assert main([*argv, "--space", "proxyless"]) == 2
    assert "first to differ is" in capsys.readouterr().err


def test_two_processes_train_one_supernet_from_a_project(tracking: str, root: Path, space: str) -> None:
    import mlflow

    asked = {"nproc_per_node": "2", "data": "digits", "space": space, "max_train": "200", "epochs": "2"}
    asked |= {"accumulate": "2"}
    submitted = mlflow.projects.run(
        str(root), entry_point="supernet_torchrun", parameters=asked, env_manager="local", experiment_id="0"
    )
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.info.run_id == submitted.run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/top1_max"] > 0
    assert mlflow.MlflowClient().get_model_version("foxnas-supernet", "1").run_id == submitted.run_id


def test_what_follows_a_supernet_is_its_sampling_whatever_it_is_called(tracking: str) -> None:
    import mlflow

    from foxnas_mlflow import get_target
    from foxnas_mlflow.tracking.search import _with_weights

    uri = register_mini_supernet("my net")
    version = mlflow.MlflowClient().get_model_version("my net-supernet", "1")
    assert version.description.endswith(f"foxnas sample --supernet '{uri}'")
    # A search alone would have predictors of another space.
    assert _with_weights("my net", get_target("rpi4")) == f"foxnas sample --supernet '{uri}' --target rpi4"
