"""Searchers: simulated annealing, evolution, random, and the exact front."""

from foxnas_mlflow.core.searchers._annealing import SimulatedAnnealing
from foxnas_mlflow.core.searchers._base import Searcher, SearchResult, TracePoint
from foxnas_mlflow.core.searchers._evidence import (
    Combined,
    Signal,
    accuracy_signal,
    combine,
    evaluation_covariance,
    paired_difference,
    prediction_covariance,
    rank_signal,
)
from foxnas_mlflow.core.searchers._evolution import Evolution
from foxnas_mlflow.core.searchers._exact import Front, Optimum, exact_front, exact_optimum, fastest, front_of, least
from foxnas_mlflow.core.searchers._limited import solve
from foxnas_mlflow.core.searchers._limits import Limit, describe_limits, parse_limits
from foxnas_mlflow.core.searchers._objective import Objective
from foxnas_mlflow.core.searchers._prices import LimitPrice, feasible_points, limit_prices, spoken, spoken_unit
from foxnas_mlflow.core.searchers._problem import Problem
from foxnas_mlflow.core.searchers._quantities import check_quantity
from foxnas_mlflow.core.searchers._random import RandomSearch
from foxnas_mlflow.core.searchers._rounds import Loop, Round, closed_loop, promises_more
from foxnas_mlflow.core.searchers._search import (
    DEFAULT_EVALUATIONS,
    KNEE,
    SEARCHERS,
    SearchOutcome,
    Solved,
    check_latencies,
    get_searcher,
    outcome_of,
    pose,
    pose_each,
    search,
    search_each,
    search_problem,
    solve_both,
)
from foxnas_mlflow.core.searchers._tweak import Edit, ValuedEdit, rank_edits, value_edits
from foxnas_mlflow.core.searchers._verify import Candidate, Evaluated, Verdict, candidates, choose, verify

__all__ = [
    "DEFAULT_EVALUATIONS",
    "KNEE",
    "SEARCHERS",
    "Candidate",
    "Combined",
    "Edit",
    "Evaluated",
    "Evolution",
    "Front",
    "Limit",
    "LimitPrice",
    "Loop",
    "Objective",
    "Optimum",
    "Problem",
    "RandomSearch",
    "Round",
    "SearchOutcome",
    "SearchResult",
    "Searcher",
    "Signal",
    "SimulatedAnnealing",
    "Solved",
    "TracePoint",
    "ValuedEdit",
    "Verdict",
    "accuracy_signal",
    "candidates",
    "check_latencies",
    "check_quantity",
    "choose",
    "closed_loop",
    "combine",
    "describe_limits",
    "evaluation_covariance",
    "exact_front",
    "exact_optimum",
    "fastest",
    "feasible_points",
    "front_of",
    "get_searcher",
    "least",
    "limit_prices",
    "outcome_of",
    "paired_difference",
    "parse_limits",
    "pose",
    "pose_each",
    "prediction_covariance",
    "promises_more",
    "rank_edits",
    "rank_signal",
    "search",
    "search_each",
    "search_problem",
    "solve",
    "solve_both",
    "spoken",
    "spoken_unit",
    "value_edits",
    "verify",
]
