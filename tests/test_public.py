"""The public face: all that README and examples need is importable from the package itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import foxnas_mlflow
from foxnas_mlflow import workflows
from foxnas_mlflow.core import errors
from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def imports(source: str) -> list[tuple[str, str]]:
    """Module and name of everything that a program imports from this package."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("foxnas_mlflow"):
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.startswith("foxnas_mlflow")]
    return found


def test_every_public_name_is_there_and_the_same_for_type_checkers() -> None:
    source = Path(foxnas_mlflow.__file__).read_text(encoding="utf-8")
    typed = {name: module for module, name in imports(source) if module != "foxnas_mlflow._version"}
    assert {*typed, "__version__"} == set(foxnas_mlflow.__all__)
    for name, module in typed.items():
        assert getattr(foxnas_mlflow, name) is getattr(sys.modules[module], name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = foxnas_mlflow.nothing


def test_every_error_and_every_step_is_public() -> None:
    raised = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.FoxNasError)}
    steps = {n for n in workflows.__all__ if re.fullmatch(r"run_\w+|[A-Z]\w+(Request|Result)", n)}
    assert {"run_search", "SearchRequest", "SearchResult"} <= steps
    assert raised | steps <= set(foxnas_mlflow.__all__)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_import_from_the_package_alone(path: Path) -> None:
    assert {module for module, _ in imports(path.read_text(encoding="utf-8"))} <= {"foxnas_mlflow"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_import_from_the_package_or_its_testing(path: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for module, name in imports(code):
            assert module in ("foxnas_mlflow", "foxnas_mlflow.testing")
            if module == "foxnas_mlflow":
                assert name in foxnas_mlflow.__all__


def test_a_step_is_asked_for_without_importing_anything_heavy() -> None:
    heavy = ("torch", "tensorflow", "statsmodels", "mlflow", "matplotlib", "plotly", "pandas", "scipy")
    code = (
        "import sys; from foxnas_mlflow import SearchRequest, InvalidInputError, run_search\n"
        "SearchRequest(target='rpi4', latency_ms=60)\n"
        f"sys.exit(' '.join(m for m in {heavy} if m in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
