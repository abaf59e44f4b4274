"""Hardware-aware neural architecture search (FOX-NAS) as an MLflow plugin.

The public face: what a program needs is imported from here. Importing the package imports nothing heavy;
the names below load on first use.

    from foxnas_mlflow import reference_predictors, search

    outcome = search(reference_predictors("rpi4"), latency_ms=60)
    print(outcome.architecture, outcome.accuracy, outcome.latency_upper_ms)

Every step of the command line is a function from a request to a result (`run_search`, `SearchRequest`, `SearchResult`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from foxnas_mlflow._version import __version__

if TYPE_CHECKING:
    from foxnas_mlflow.core.architecture import Architecture as Architecture
    from foxnas_mlflow.core.cost import NetworkCost as NetworkCost
    from foxnas_mlflow.core.cost import network_cost as network_cost
    from foxnas_mlflow.core.errors import ConnectionLostError as ConnectionLostError
    from foxnas_mlflow.core.errors import ConversionError as ConversionError
    from foxnas_mlflow.core.errors import DeviceError as DeviceError
    from foxnas_mlflow.core.errors import FitError as FitError
    from foxnas_mlflow.core.errors import FoxNasError as FoxNasError
    from foxnas_mlflow.core.errors import InfeasibleConstraintError as InfeasibleConstraintError
    from foxnas_mlflow.core.errors import InfeasibleLimitsError as InfeasibleLimitsError
    from foxnas_mlflow.core.errors import InvalidArchitectureError as InvalidArchitectureError
    from foxnas_mlflow.core.errors import InvalidFormatError as InvalidFormatError
    from foxnas_mlflow.core.errors import InvalidInputError as InvalidInputError
    from foxnas_mlflow.core.errors import InvalidMeasurementsError as InvalidMeasurementsError
    from foxnas_mlflow.core.errors import InvalidSpaceError as InvalidSpaceError
    from foxnas_mlflow.core.errors import MissingDependencyError as MissingDependencyError
    from foxnas_mlflow.core.errors import OutOfDomainError as OutOfDomainError
    from foxnas_mlflow.core.errors import PromotionError as PromotionError
    from foxnas_mlflow.core.errors import RankDeficientError as RankDeficientError
    from foxnas_mlflow.core.errors import RegistrationError as RegistrationError
    from foxnas_mlflow.core.errors import TooFewSamplesError as TooFewSamplesError
    from foxnas_mlflow.core.errors import TrainingError as TrainingError
    from foxnas_mlflow.core.errors import UnknownTargetError as UnknownTargetError
    from foxnas_mlflow.core.errors import WorkerLostError as WorkerLostError
    from foxnas_mlflow.core.measurements import Measurement as Measurement
    from foxnas_mlflow.core.measurements import read_measurements as read_measurements
    from foxnas_mlflow.core.network import Network as Network
    from foxnas_mlflow.core.network import build_network as build_network
    from foxnas_mlflow.core.predictors import Effect as Effect
    from foxnas_mlflow.core.predictors import FitReport as FitReport
    from foxnas_mlflow.core.predictors import FitResult as FitResult
    from foxnas_mlflow.core.predictors import LinearPredictor as LinearPredictor
    from foxnas_mlflow.core.predictors import PredictorSet as PredictorSet
    from foxnas_mlflow.core.predictors import fit_predictors as fit_predictors
    from foxnas_mlflow.core.predictors import load_predictors as load_predictors
    from foxnas_mlflow.core.predictors import marginal_effects as marginal_effects
    from foxnas_mlflow.core.predictors import reference_latency as reference_latency
    from foxnas_mlflow.core.predictors import reference_predictors as reference_predictors
    from foxnas_mlflow.core.searchers import Edit as Edit
    from foxnas_mlflow.core.searchers import Evolution as Evolution
    from foxnas_mlflow.core.searchers import Front as Front
    from foxnas_mlflow.core.searchers import Limit as Limit
    from foxnas_mlflow.core.searchers import LimitPrice as LimitPrice
    from foxnas_mlflow.core.searchers import Objective as Objective
    from foxnas_mlflow.core.searchers import Optimum as Optimum
    from foxnas_mlflow.core.searchers import Problem as Problem
    from foxnas_mlflow.core.searchers import RandomSearch as RandomSearch
    from foxnas_mlflow.core.searchers import Searcher as Searcher
    from foxnas_mlflow.core.searchers import SearchOutcome as SearchOutcome
    from foxnas_mlflow.core.searchers import SimulatedAnnealing as SimulatedAnnealing
    from foxnas_mlflow.core.searchers import exact_front as exact_front
    from foxnas_mlflow.core.searchers import exact_optimum as exact_optimum
    from foxnas_mlflow.core.searchers import fastest as fastest
    from foxnas_mlflow.core.searchers import get_searcher as get_searcher
    from foxnas_mlflow.core.searchers import limit_prices as limit_prices
    from foxnas_mlflow.core.searchers import parse_limits as parse_limits
    from foxnas_mlflow.core.searchers import pose as pose
    from foxnas_mlflow.core.searchers import rank_edits as rank_edits
    from foxnas_mlflow.core.searchers import search as search
    from foxnas_mlflow.core.searchers import search_each as search_each
    from foxnas_mlflow.core.space import SearchSpace as SearchSpace
    from foxnas_mlflow.core.space import get_space as get_space
    from foxnas_mlflow.core.targets import Target as Target
    from foxnas_mlflow.core.targets import get_target as get_target
    from foxnas_mlflow.flavor import get_default_conda_env as get_default_conda_env
    from foxnas_mlflow.flavor import get_default_pip_requirements as get_default_pip_requirements
    from foxnas_mlflow.flavor import load_model as load_model
    from foxnas_mlflow.flavor import log_model as log_model
    from foxnas_mlflow.flavor import save_model as save_model
    from foxnas_mlflow.workflows import BenchmarkRequest as BenchmarkRequest
    from foxnas_mlflow.workflows import BenchmarkResult as BenchmarkResult
    from foxnas_mlflow.workflows import CompareRequest as CompareRequest
    from foxnas_mlflow.workflows import CompareResult as CompareResult
    from foxnas_mlflow.workflows import DeviceRequest as DeviceRequest
    from foxnas_mlflow.workflows import DeviceResult as DeviceResult
    from foxnas_mlflow.workflows import DoctorRequest as DoctorRequest
    from foxnas_mlflow.workflows import DoctorResult as DoctorResult
    from foxnas_mlflow.workflows import EstimateRequest as EstimateRequest
    from foxnas_mlflow.workflows import EstimateResult as EstimateResult
    from foxnas_mlflow.workflows import FinetuneRequest as FinetuneRequest
    from foxnas_mlflow.workflows import FinetuneResult as FinetuneResult
    from foxnas_mlflow.workflows import FitRequest as FitRequest
    from foxnas_mlflow.workflows import FitStepResult as FitStepResult
    from foxnas_mlflow.workflows import InitRequest as InitRequest
    from foxnas_mlflow.workflows import InitResult as InitResult
    from foxnas_mlflow.workflows import LineageRequest as LineageRequest
    from foxnas_mlflow.workflows import LineageResult as LineageResult
    from foxnas_mlflow.workflows import MainRequest as MainRequest
    from foxnas_mlflow.workflows import MainResult as MainResult
    from foxnas_mlflow.workflows import PromoteRequest as PromoteRequest
    from foxnas_mlflow.workflows import PromoteResult as PromoteResult
    from foxnas_mlflow.workflows import QuantizeRequest as QuantizeRequest
    from foxnas_mlflow.workflows import QuantizeResult as QuantizeResult
    from foxnas_mlflow.workflows import SampleRequest as SampleRequest
    from foxnas_mlflow.workflows import SampleResult as SampleResult
    from foxnas_mlflow.workflows import SearchRequest as SearchRequest
    from foxnas_mlflow.workflows import SearchResult as SearchResult
    from foxnas_mlflow.workflows import SignRequest as SignRequest
    from foxnas_mlflow.workflows import SignResult as SignResult
    from foxnas_mlflow.workflows import SupernetRequest as SupernetRequest
    from foxnas_mlflow.workflows import SupernetResult as SupernetResult
    from foxnas_mlflow.workflows import WatchRequest as WatchRequest
    from foxnas_mlflow.workflows import WatchResult as WatchResult
    from foxnas_mlflow.workflows import run_benchmark as run_benchmark
    from foxnas_mlflow.workflows import run_compare as run_compare
    from foxnas_mlflow.workflows import run_device as run_device
    from foxnas_mlflow.workflows import run_doctor as run_doctor
    from foxnas_mlflow.workflows import run_estimate as run_estimate
    from foxnas_mlflow.workflows import run_finetune as run_finetune
    from foxnas_mlflow.workflows import run_fit as run_fit
    from foxnas_mlflow.workflows import run_init as run_init
    from foxnas_mlflow.workflows import run_lineage as run_lineage
    from foxnas_mlflow.workflows import run_main as run_main
    from foxnas_mlflow.workflows import run_promote as run_promote
    from foxnas_mlflow.workflows import run_quantize as run_quantize
    from foxnas_mlflow.workflows import run_sample as run_sample
    from foxnas_mlflow.workflows import run_search as run_search
    from foxnas_mlflow.workflows import run_sign as run_sign
    from foxnas_mlflow.workflows import run_supernet as run_supernet
    from foxnas_mlflow.workflows import run_watch as run_watch

_PUBLIC = {
    "foxnas_mlflow.core.architecture": ("Architecture",),
    "foxnas_mlflow.core.cost": (
        "NetworkCost",
        "network_cost",
    ),
    "foxnas_mlflow.core.errors": (
        "ConnectionLostError",
        "ConversionError",
        "DeviceError",
        "FitError",
        "FoxNasError",
        "InfeasibleConstraintError",
        "InfeasibleLimitsError",
        "InvalidArchitectureError",
        "InvalidFormatError",
        "InvalidInputError",
        "InvalidMeasurementsError",
        "InvalidSpaceError",
        "MissingDependencyError",
        "OutOfDomainError",
        "PromotionError",
        "RankDeficientError",
        "RegistrationError",
        "TooFewSamplesError",
        "TrainingError",
        "UnknownTargetError",
        "WorkerLostError",
    ),
    "foxnas_mlflow.core.measurements": (
        "Measurement",
        "read_measurements",
    ),
    "foxnas_mlflow.core.network": (
        "Network",
        "build_network",
    ),
    "foxnas_mlflow.core.predictors": (
        "Effect",
        "FitReport",
        "FitResult",
        "LinearPredictor",
        "PredictorSet",
        "fit_predictors",
        "load_predictors",
        "marginal_effects",
        "reference_latency",
        "reference_predictors",
    ),
    "foxnas_mlflow.core.searchers": (
        "Edit",
        "Evolution",
        "Front",
        "Limit",
        "LimitPrice",
        "Objective",
        "Optimum",
        "Problem",
        "RandomSearch",
        "SearchOutcome",
        "Searcher",
        "SimulatedAnnealing",
        "exact_front",
        "exact_optimum",
        "fastest",
        "get_searcher",
        "limit_prices",
        "parse_limits",
        "pose",
        "rank_edits",
        "search",
        "search_each",
    ),
    "foxnas_mlflow.core.space": (
        "SearchSpace",
        "get_space",
    ),
    "foxnas_mlflow.core.targets": (
        "Target",
        "get_target",
    ),
    "foxnas_mlflow.flavor": (
        "get_default_conda_env",
        "get_default_pip_requirements",
        "load_model",
        "log_model",
        "save_model",
    ),
    "foxnas_mlflow.workflows": (
        "BenchmarkRequest",
        "BenchmarkResult",
        "CompareRequest",
        "CompareResult",
        "DeviceRequest",
        "DeviceResult",
        "DoctorRequest",
        "DoctorResult",
        "EstimateRequest",
        "EstimateResult",
        "FinetuneRequest",
        "FinetuneResult",
        "FitRequest",
        "FitStepResult",
        "InitRequest",
        "InitResult",
        "LineageRequest",
        "MainRequest",
        "LineageResult",
        "MainResult",
        "PromoteRequest",
        "PromoteResult",
        "QuantizeRequest",
        "QuantizeResult",
        "SampleRequest",
        "SampleResult",
        "SearchRequest",
        "SearchResult",
        "SignRequest",
        "SignResult",
        "SupernetRequest",
        "SupernetResult",
        "WatchRequest",
        "WatchResult",
        "run_benchmark",
        "run_compare",
        "run_device",
        "run_doctor",
        "run_estimate",
        "run_finetune",
        "run_fit",
        "run_init",
        "run_lineage",
        "run_main",
        "run_promote",
        "run_quantize",
        "run_sample",
        "run_search",
        "run_sign",
        "run_supernet",
        "run_watch",
    ),
}
"""Public names by the module that has them, as the imports above say them for type checkers."""

_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
