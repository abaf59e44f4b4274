"""Whatever is lost in the middle of a sampling, its rows are not; `python -m tests.kills` does it at 20 moments."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.kills import moment


@pytest.mark.parametrize("kind", ["process", "worker", "board"])
def test_a_loss_costs_no_row_and_changes_none(kind: str, tmp_path: Path) -> None:
    assert "the same table" in moment(kind, random.Random(kind), tmp_path)
