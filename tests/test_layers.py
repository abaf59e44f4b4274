"""What import-linter cannot say of imports: which heavy libraries one module may know."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

HEAVY = {"torch", "tensorflow", "mlflow"}
MODULES = sorted((ROOT / "foxnas_mlflow").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of all that a module imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_knows_one_heavy_library_at_most(path: Path) -> None:
    assert len(imported(path) & HEAVY) <= 1


def test_an_import_inside_a_function_counts(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("import torch\ndef f():\n    from mlflow import MlflowClient\n")
    assert imported(module) == {"torch", "mlflow"}
