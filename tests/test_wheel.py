"""The wheel holds all that it needs: it is built, installed beside nothing of the checkout, and used from elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import copy_store

pytestmark = [pytest.mark.slow, pytest.mark.server]


def test_the_wheel_works_without_the_checkout(root: Path, empty_store: Path, tmp_path: Path) -> None:
    # A copy: setuptools builds in the source's folder, and what an earlier build left there would be packed too.
    source = tmp_path / "source"
    shutil.copytree(root / "foxnas_mlflow", source / "foxnas_mlflow", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True, timeout=300)
    (wheel,) = tmp_path.glob("foxnas_mlflow-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True, timeout=300)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {**os.environ, "PYTHONPATH": str(site), "MLFLOW_TRACKING_URI": copy_store(empty_store, tmp_path)}

    def foxnas(*argv: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "foxnas_mlflow", *argv],
            cwd=elsewhere,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-P", "-c", "import foxnas_mlflow; print(foxnas_mlflow.__file__)"],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    assert "--finetune-epochs" in foxnas("main", "--help")
    # Its project, as mlflow run takes it.
    foxnas("init", "project")
    command = [sys.executable, "-m", "mlflow", "run", "project", "-e", "search", "-P", "evaluations=2000"]
    done = subprocess.run(
        [*command, "--env-manager", "local"],
        cwd=elsewhere,
        env=env | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "models:/foxnas-subnet-rpi4/1" in done.stdout + done.stderr
