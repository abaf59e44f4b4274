"""The examples run, and say what they are there to show."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from foxnas_mlflow.cli.main import build_parser, main
from tests.containers import docker_client, import_image

KUBERNETES = "1.31"


def _only(required: str, **properties: Any) -> dict[str, Any]:
    """The schema of an object with these properties and no others; a type stands for its schema."""
    known = {key: {"type": value} if isinstance(value, str) else value for key, value in properties.items()}
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": known}


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
RAY_JOB = _only(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata="object",
    spec=_only(
        "entrypoint rayClusterSpec",
        entrypoint="string",
        backoffLimit="integer",
        shutdownAfterJobFinishes="boolean",
        ttlSecondsAfterFinished="integer",
        rayClusterSpec=_only(
            "headGroupSpec",
            rayVersion="string",
            headGroupSpec=_only("template", rayStartParams=_TEXTS, template="object"),
            workerGroupSpecs={
                "type": "array",
                "items": _only(
                    "groupName minReplicas maxReplicas template",
                    groupName="string",
                    replicas="integer",
                    minReplicas="integer",
                    maxReplicas="integer",
                    rayStartParams=_TEXTS,
                    template="object",
                ),
            },
        ),
    ),
)
"""Of KubeRay's resource `RayJob` (v1) what the example uses, with the names and types of its definition."""


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
@pytest.mark.usefixtures("undisturbed")
def test_a_new_board(root: Path, tracking: str, tmp_path: Path) -> None:
    import mlflow

    small = ["--n-checks", "3", "--n-probes", "11", "--image-size", "128"]
    done = subprocess.run(
        [sys.executable, str(root / "examples" / "03_new_board.py"), "local", *small],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((os.environ["PYTHONPATH"], str(root)))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
    config = json.loads((folder / "kubernetes_config.json").read_text())
    assert (root / config["kube-job-template-path"]).samefile(folder / "job.yaml")
    task = json.loads((folder / "databricks.json").read_text())["tasks"][0]["python_wheel_task"]
    build_parser().parse_args(task["parameters"])


@pytest.mark.slow
def test_the_steps_of_the_image_install_the_project_with_its_extras(root: Path, tmp_path: Path) -> None:
    import docker.errors

    dockerfile = (root / "examples" / "06_cluster" / "Dockerfile").read_text()
    base = re.search(r"^FROM (\S+)$", dockerfile, re.M)
    assert base is not None
    assert re.fullmatch(r"python:3\.\d+-slim", base[1])
    # This host's Python stands for the base, and its dependencies are not downloaded; the steps are the file's own.
    quiet = "ENV PIP_NO_DEPS=1 PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 PIP_NO_WARN_SCRIPT_LOCATION=1"
    for place in ("PATH=/usr/local/bin:/bin", "PYTHONPATH=/opt/packages"):
        quiet += f" {place}"
    context = tmp_path / "context.tar"
    with tarfile.open(context, "w") as tar:
        for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "foxnas_mlflow"):
            tar.add(root / name, name, filter=lambda entry: None if "__pycache__" in entry.name else entry)
        text = dockerfile.replace(base[0], "FROM foxnas-test-python:latest\nRUN /bin/ln -s /bin/python3 /bin/python")
        text = text.replace("RUN pip ", "RUN python3 -m pip ")
        (tmp_path / "Dockerfile").write_text(text)
        tar.add(tmp_path / "Dockerfile", "Dockerfile")
    with docker_client() as client:
        # What builds wheels, with the metadata by which it is found.
        files = [
            f for name in ("pip", "setuptools", "wheel", "packaging") for f in importlib.metadata.files(name) or ()
        ]
        packages = sorted({f.parts[0] for f in files if len(f.parts) > 1} - {".."})
        import_image(client, "foxnas-test-python:latest", tmp_path / "base.tar", packages, quiet)
        try:
            with context.open("rb") as file:
                log = list(client.api.build(fileobj=file, custom_context=True, tag="foxnas-test-image", decode=True))
            said = "".join(line.get("stream", "") or line.get("error", "") for line in log)
            assert "Successfully tagged" in said, said
            assert "does not provide the extra" not in said
            asked = "import foxnas_mlflow as f, importlib.metadata as m; print(f.__version__, m.version(f.__name__))"
            found = client.containers.run("foxnas-test-image:latest", ["python3", "-c", asked], remove=True)
            assert len(set(found.decode().split())) == 1
        finally:
            for name in ("foxnas-test-image:latest", "foxnas-test-python:latest"):
                with contextlib.suppress(docker.errors.ImageNotFound):
                    client.images.remove(name, force=True)


def test_the_job_that_mlflow_fills_in_fits_the_schema_of_kubernetes(root: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    folder = root / "examples" / "06_cluster"
    name = yaml.safe_load((folder / "MLproject").read_text())["name"]
    job = yaml.safe_load((folder / "job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    # As mlflow.projects.kubernetes does it.
    job["metadata"]["name"] = f"{name}-2026-01-01-00-00-00-000000"
    container |= {
        "name": name,
        "image": "registry.example.com/foxnas:1@sha256:0",
        "command": ["python", "-m", "foxnas"],
    }
    container["env"] = [*container.get("env", []), {"name": "MLFLOW_RUN_ID", "value": "0"}]
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    _check_pod(job["spec"]["template"]["spec"])


def test_the_ray_job_fits_its_schema_and_runs_the_pipeline(root: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    jsonschema = pytest.importorskip("jsonschema")
    job = yaml.safe_load((root / "examples" / "06_cluster" / "ray.yaml").read_text())
    jsonschema.validate(job, RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], workers):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        _check_pod(group["template"]["spec"])
    python, flag, module, *command = job["spec"]["entrypoint"].split()
    assert (python, flag, module) == ("python", "-m", "foxnas_mlflow")
    asked = build_parser().parse_args(command)
    # A processor of the cluster for each worker, none of them the head's.
    processors = int(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"])
    processors += workers["replicas"] * int(workers["rayStartParams"]["num-cpus"])
    assert int(asked.workers) == processors


def _check_pod(spec: dict[str, Any]) -> None:
    """What the API server refuses beyond the schema: names, and mounts of volumes that are not there."""
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in spec["containers"]:
        assert re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", container["name"])
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
