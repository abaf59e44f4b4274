"""What a run tells of its images: warnings, damaged files, and files that break while it lasts."""

from __future__ import annotations

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
