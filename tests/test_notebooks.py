"""The notebooks run from their first cell to their last, and come to what their pages show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT


def executed(name: str, **shorter: int) -> tuple[Any, Any]:
    """A notebook as it is in the repository, and as it comes out when it is executed.

    Args:
        name: Of its file.
        shorter: Arguments of calls in it, to the values that they have here.
    """
    path = ROOT / "docs" / "notebooks" / f"{name}.ipynb"
    kept, fresh = nbformat.read(path, 4), nbformat.read(path, 4)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            for argument, value in shorter.items():
                cell.source = re.sub(rf"\b{argument}=\d+", f"{argument}={value}", cell.source)
    NotebookClient(fresh, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    return kept, fresh


def printed(notebook: Any) -> str:
    """Everything that its cells wrote to stdout."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


@pytest.mark.usefixtures("kernel")
def test_the_search_from_published_measurements_says_what_its_page_says() -> None:
    kept, fresh = executed("published_measurements")
    assert printed(fresh) == printed(kept)
    assert "is predicted more accurate than" in printed(kept)
    assert pictures(fresh) == pictures(kept) == 1


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.train
@pytest.mark.tflite
@pytest.mark.usefixtures("kernel", "undisturbed")
def test_own_images_become_a_served_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    kept, fresh = executed("own_images", epochs=2, n_compare=0)
    for notebook, least in ((kept, 80), (fresh, 20)):
        said = printed(notebook)
        # Where the comparison finds a better network, the search is done again: another version.
        assert re.search(r"^models:/foxnas-cpu/[1-4]$", said, re.M)
        accuracy = re.search(r"^accuracy/int8_top1: (\S+)$", said, re.M)
        assert accuracy is not None
        assert float(accuracy[1]) > least  # of ten classes
        assert re.search(r"^digit 0: digit \d \(\d\.\d\d\)$", said, re.M)
        assert pictures(notebook) == 1
