"""The examples run, and say what they are there to show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from foxnas_mlflow.cli.main import build_parser, main


def run(root: Path, *argv: str, timeout: float = 300) -> str:
    done = subprocess.run(
        [sys.executable, *argv], cwd=root, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("01_published_measurements", "0.0000  2-"),
        ("04_custom_space", "tiny3: 1.78e+06 networks"),
    ],
)
def test_an_example_runs(root: Path, example: str, said: str) -> None:
    assert said in run(root, f"examples/{example}.py")


def test_search_from_the_authors_table(root: Path, shared_data: Path) -> None:
    out = run(root, "examples/01_published_measurements.py", str(shared_data / "foxnas_rpi4_cpu256.csv"))
    assert "accuracy: 300 rows, cross-validated R2 0.97" in out


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.tflite
def test_a_new_board(root: Path, tracking: str, tmp_path: Path) -> None:
    import mlflow

    # Probes that something disturbed are measured by the next call; those that were steady are kept.
    for _ in range(4):
        done = subprocess.run(
            [sys.executable, str(root / "examples" / "03_new_board.py"), "local", "--n-checks", "3"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode == 0:
            break
        assert "must be measured without disturbance" in done.stderr, done.stderr[-3000:]
    assert done.stdout.count("% predicted, cpu @ ") == 3
    # The calibrated target is one that foxnas search takes, and it says whose milliseconds these are.
    following = re.search(
        r"^Next: foxnas (search --target board.yaml --latency-ms (\S+) --confidence 0.75)$", done.stdout, re.M
    )
    assert following is not None
    assert main([*following[1].split(), "--evaluations", "2000"]) == 0
    client = mlflow.MlflowClient()
    (found,) = client.search_runs(["0"])
    tags = found.data.tags
    assert (tags["foxnas.target"], tags["foxnas.latency_source"]) == ("board", "cost_model")
    assert tags["foxnas.predictors"] == "board-predictors.json"
    assert tags["foxnas.latency_note"].startswith("milliseconds of a cost model calibrated on ")
    assert found.data.metrics["search/predicted_latency_upper_ms"] <= float(following[2])
    assert client.get_model_version("foxnas-subnet-board", "1").tags["latency_source"] == "cost_model"


def test_the_project_for_containers_is_the_pipeline(root: Path) -> None:
    from mlflow.projects._project_spec import load_project

    whole, variant = load_project(str(root)), load_project(str(root / "examples" / "06_cluster"))
    assert variant.docker_env["image"] == "foxnas:latest"
    entry, same = variant.get_entry_point("main"), whole.get_entry_point("main")
    assert (entry.command, set(entry.parameters)) == (same.command, set(same.parameters))
    folder = root / "examples" / "06_cluster"
    job = yaml.safe_load((folder / "job.yaml").read_text())
    assert len(job["spec"]["template"]["spec"]["containers"]) == 1
    config = json.loads((folder / "kubernetes_config.json").read_text())
    assert (root / config["kube-job-template-path"]).samefile(folder / "job.yaml")
    task = json.loads((folder / "databricks.json").read_text())["tasks"][0]["python_wheel_task"]
    build_parser().parse_args(task["parameters"])
