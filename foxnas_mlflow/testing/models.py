"""What every kind of model of the flavor must do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from foxnas_mlflow.core.errors import InvalidFormatError


class ModelKindSuite:
    """Tests of a kind of model; a subclass makes one, and something to predict from."""

    def model(self, directory: Path) -> Any:
        """A model of this kind.

        Args:
            directory: Where files of it can be put; they stay until the test ends.

        Raises:
            NotImplementedError: If the subclass makes none.
        """
        raise NotImplementedError

    def inputs(self) -> pd.DataFrame:
        """What its pyfunc predicts from.

        Raises:
            NotImplementedError: If the subclass has none.
        """
        raise NotImplementedError

    def test_predicts_the_same_after_it_was_saved_twice(self, tmp_path: Path) -> None:
        """Saved, loaded, and saved again, it answers the same."""
        first = self._saved(self.model(tmp_path), tmp_path / "first")
        again = self._saved(self._load(first), tmp_path / "again")
        _assert_same(self._predicted(first), self._predicted(again))

    def test_answers_one_row_for_each_of_the_inputs(self, tmp_path: Path) -> None:
        """As many answers as questions, with names."""
        answers = self._predicted(self._saved(self.model(tmp_path), tmp_path / "saved"))
        assert len(answers) == len(self.inputs())
        assert all(isinstance(column, str) and column for column in answers.columns)

    def test_says_what_it_takes_and_what_it_answers(self, tmp_path: Path) -> None:
        """The signature names the columns of the inputs, and an example is stored."""
        from mlflow.models import Model

        logged = Model.load(str(self._saved(self.model(tmp_path), tmp_path / "saved")))
        assert logged.signature is not None
        assert set(self.inputs().columns) <= set(logged.signature.inputs.input_names())
        assert logged.signature.outputs is not None
        assert logged.saved_input_example_info is not None

    def test_a_changed_byte_is_refused(self, tmp_path: Path) -> None:
        """Whatever of its own files is changed, it is not loaded."""
        saved = self._saved(self.model(tmp_path), tmp_path / "saved")
        files = sorted(path for path in (saved / "data").rglob("*") if path.is_file())
        assert files
        for path in files:
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(InvalidFormatError):
                self._load(saved)
            path.write_bytes(content)
        self._load(saved)

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        """A model that lost a file is not loaded."""
        saved = self._saved(self.model(tmp_path), tmp_path / "saved")
        for path in sorted(path for path in (saved / "data").rglob("*") if path.is_file()):
            content = path.read_bytes()
            path.unlink()
            with pytest.raises(InvalidFormatError):
                self._load(saved)
            path.write_bytes(content)

    def _saved(self, model: Any, path: Path) -> Path:
        from foxnas_mlflow.flavor import save_model

        save_model(model, str(path))
        return path

    def _load(self, path: Path) -> Any:
        from foxnas_mlflow.flavor import load_model

        return load_model(str(path))

    def _predicted(self, path: Path) -> pd.DataFrame:
        import mlflow

        return pd.DataFrame(mlflow.pyfunc.load_model(str(path)).predict(self.inputs()))


def _assert_same(first: pd.DataFrame, again: pd.DataFrame) -> None:
    assert list(first.columns) == list(again.columns)
    for column in first.columns:
        values = first[column].to_numpy()
        if np.issubdtype(values.dtype, np.number):
            np.testing.assert_allclose(values.astype(float), again[column].to_numpy().astype(float), rtol=1e-6)
        else:
            assert list(values) == list(again[column])
