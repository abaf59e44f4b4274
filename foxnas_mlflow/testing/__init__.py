"""Conformance suites: what a searcher, a formula, a connection, a timer or a model kind must do to fit in.

A suite is a class of pytest tests. Derive from it, say what is to be tested, and pytest runs it:

    from foxnas_mlflow.testing import SearcherSuite

    class TestMySearcher(SearcherSuite):
        def searcher(self):
            return MySearcher()

The project's own implementations pass the same suites. Needs pytest. `FakeBoard` is a board for tests: it measures
whatever latencies it is told to, at once, and says that they are nobody's.
"""

from foxnas_mlflow.testing.boards import FakeBoard
from foxnas_mlflow.testing.connections import ConnectionSuite
from foxnas_mlflow.testing.formulas import FormulaSuite
from foxnas_mlflow.testing.models import ModelKindSuite
from foxnas_mlflow.testing.searchers import SearcherSuite
from foxnas_mlflow.testing.timers import TimerSuite

__all__ = ["ConnectionSuite", "FakeBoard", "FormulaSuite", "ModelKindSuite", "SearcherSuite", "TimerSuite"]
