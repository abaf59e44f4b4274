"""What a run tells of its images: warnings, damaged files, and files that break while it lasts."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest

from foxnas_mlflow.data import FileImages, Preprocessing, load_dataset, prepared_batches
from foxnas_mlflow.tracking.run import entry_run
from foxnas_mlflow.tracking.supernet import log_dataset

image = pytest.importorskip("PIL.Image")


def lines(run_id: str, name: str) -> list[str]:
    return mlflow.artifacts.load_text(f"runs:/{run_id}/{name}").splitlines()


def pictures(root: Path, rng: np.random.Generator) -> Path:
    """A folder with two classes of 24 pictures each."""
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for i in range(24):
            image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / label / f"{i:02}.png")
    return root


def test_a_run_keeps_the_warnings_of_its_images_and_what_broke_meanwhile(
    tracking: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    for label, n in (("cat", 22), ("dog", 12)):
        (tmp_path / label).mkdir()
        for i in range(n):
            image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(tmp_path / label / f"{i}.png")
    (tmp_path / "cat/0.png").write_bytes(b"torn")
    (tmp_path / "dog/song.mp3").write_bytes(b"la")
    dataset = load_dataset(str(tmp_path))
    assert isinstance(dataset.val, FileImages)
    with entry_run(stage="sample", params={}) as run:
        log_dataset(run, dataset, context="evaluation")
        dataset.val.paths[0].write_bytes(b"torn")
        assert sum(len(targets) for _, targets in prepared_batches(dataset.val, Preprocessing(8))) == 5
    data = mlflow.get_run(run.run_id).data
    assert lines(run.run_id, "data_warnings.txt") == dataset.warnings()
    assert [line.split(":")[0] for line in dataset.warnings()] == [
        "files that are not read",
        "1 damaged files are left out",
    ]
    assert data.tags["foxnas.data_warnings"] == "2"
    assert lines(run.run_id, "unreadable.txt") == [str(tmp_path / "cat/0.png")]
    assert lines(run.run_id, "skipped.txt") == [str(dataset.val.paths[0])]
    assert data.metrics["data/skipped"] == 1
    # Another run of the same process counts only what breaks in its own time.
    with entry_run(stage="quantize", params={}) as other:
        log_dataset(other, dataset, context="quantization")
    assert "data/skipped" not in mlflow.get_run(other.run_id).data.metrics


@pytest.mark.train
@pytest.mark.slow
@pytest.mark.parametrize("mended", [True, False])
def test_a_training_goes_on_when_a_broken_file_was_mended_or_removed(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, mended: bool
) -> None:
    pytest.importorskip("torch")
    from foxnas_mlflow.flavor import load_model
    from foxnas_mlflow.tracking.inputs import open_supernet
    from foxnas_mlflow.workflows import supernet as step
    from tests.supernets import MINI_SPACE

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = pictures(tmp_path / "pictures", rng)
    broken, whole = root / "cat/03.png", (root / "cat/03.png").read_bytes()
    if mended:
        broken.write_bytes(whole[:-30])
    space = tmp_path / "mini.yaml"
    space.write_text(json.dumps(MINI_SPACE.to_dict()))
    request = step.SupernetRequest(data=str(root), space=str(space), epochs=1, batch_size=8)

    class Cut(BaseException):
        pass

    def cut(*args: object) -> None:
        raise Cut

    with monkeypatch.context() as patched:
        # The machine goes down when all is trained and nothing registered.
        patched.setattr(step, "_accuracies", cut)
        with pytest.raises(Cut):
            step.run_supernet(request)
    (run,) = mlflow.search_runs(output_format="list")
    before = load_dataset(str(root))
    if mended:
        broken.write_bytes(whole)
    else:
        broken.unlink()
    assert load_dataset(str(root)).digest != before.digest
    result = step.run_supernet(request.replace(resume=run.info.run_id))
    model = load_model(result.model_uri)
    assert model.config["data_digest"] == before.digest
    # The next step takes the same images.
    assert open_supernet(result.model_uri).dataset.digest == before.digest


@pytest.mark.train
def test_a_pipeline_goes_on_with_the_pictures_that_it_began_with(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    from typing import Any

    from foxnas_mlflow.tracking.steps import DIGEST_TAG
    from foxnas_mlflow.workflows import main as pipeline
    from tests.supernets import MINI_SPACE

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = pictures(tmp_path / "pictures", rng)
    whole = (root / "cat/03.png").read_bytes()
    (root / "cat/03.png").write_bytes(whole[:-30])
    (tmp_path / "mini.yaml").write_text(json.dumps(MINI_SPACE.to_dict()))
    request = pipeline.MainRequest(data=str(root), space=str(tmp_path / "mini.yaml"), target="rpi4", device="none")

    class Stop(BaseException):
        pass

    begun: list[Any] = []

    def stop(self: Any) -> None:
        begun.append(self)
        raise Stop

    # What it would do is known by its steps' identities; minutes of training tell no more.
    monkeypatch.setattr(pipeline._Pipeline, "run", stop)

    def digest() -> str:
        with pytest.raises(Stop):
            pipeline.run_main(request)
        return str(begun[-1]._dataset.digest)

    before = digest()
    (root / "cat/03.png").write_bytes(whole)
    # Nothing was begun with the former pictures, so nothing is lost.
    mended = digest()
    assert mended != before
    former = begun[0]
    with entry_run(stage="supernet", params={}) as run:
        run.set_tags({DIGEST_TAG: former._identity("supernet", former._training()[1], ()).digest})
    assert digest() == before
    # Other pictures are other data, whatever was begun.
    (root / "dog/05.png").unlink()
    assert digest() not in (before, mended)
