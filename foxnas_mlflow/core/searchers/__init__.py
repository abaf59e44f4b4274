"""Searchers: simulated annealing, evolution, random, and the exact front."""

from foxnas_mlflow.core.searchers._annealing import SimulatedAnnealing
from foxnas_mlflow.core.searchers._base import Searcher, SearchResult, TracePoint
from foxnas_mlflow.core.searchers._evolution import Evolution
from foxnas_mlflow.core.searchers._exact import Front, Optimum, exact_front, exact_optimum, fastest, front_of
from foxnas_mlflow.core.searchers._objective import Objective
from foxnas_mlflow.core.searchers._random import RandomSearch
from foxnas_mlflow.core.searchers._search import (
    DEFAULT_EVALUATIONS,
    SEARCHERS,
    SearchOutcome,
    check_budget,
    get_searcher,
    search,
)
from foxnas_mlflow.core.searchers._tweak import Edit, rank_edits
from foxnas_mlflow.core.searchers._verify import Candidate, verify

__all__ = [
    "DEFAULT_EVALUATIONS",
    "SEARCHERS",
    "Candidate",
    "Edit",
    "Evolution",
    "Front",
    "Objective",
    "Optimum",
    "RandomSearch",
    "SearchOutcome",
    "SearchResult",
    "Searcher",
    "SimulatedAnnealing",
    "TracePoint",
    "check_budget",
    "exact_front",
    "exact_optimum",
    "fastest",
    "front_of",
    "get_searcher",
    "rank_edits",
    "search",
    "verify",
]
