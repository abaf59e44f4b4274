"""Hardware-aware neural architecture search (FOX-NAS) as an MLflow plugin.

Importing this package imports nothing heavy: the public names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from foxnas_mlflow._version import __version__

if TYPE_CHECKING:
    from foxnas_mlflow.core.architecture import Architecture as Architecture
    from foxnas_mlflow.core.predictors import fit_predictors as fit_predictors
    from foxnas_mlflow.core.searchers import exact_front as exact_front
    from foxnas_mlflow.core.searchers import search as search
    from foxnas_mlflow.core.searchers import search_each as search_each
    from foxnas_mlflow.core.space import SearchSpace as SearchSpace
    from foxnas_mlflow.flavor import get_default_conda_env as get_default_conda_env
    from foxnas_mlflow.flavor import get_default_pip_requirements as get_default_pip_requirements
    from foxnas_mlflow.flavor import load_model as load_model
    from foxnas_mlflow.flavor import log_model as log_model
    from foxnas_mlflow.flavor import save_model as save_model

_PUBLIC = {
    "Architecture": "foxnas_mlflow.core.architecture",
    "SearchSpace": "foxnas_mlflow.core.space",
    "fit_predictors": "foxnas_mlflow.core.predictors",
    "exact_front": "foxnas_mlflow.core.searchers",
    "search": "foxnas_mlflow.core.searchers",
    "search_each": "foxnas_mlflow.core.searchers",
    "get_default_conda_env": "foxnas_mlflow.flavor",
    "get_default_pip_requirements": "foxnas_mlflow.flavor",
    "load_model": "foxnas_mlflow.flavor",
    "log_model": "foxnas_mlflow.flavor",
    "save_model": "foxnas_mlflow.flavor",
}

__all__ = [
    "Architecture",
    "SearchSpace",
    "__version__",
    "exact_front",
    "fit_predictors",
    "get_default_conda_env",
    "get_default_pip_requirements",
    "load_model",
    "log_model",
    "save_model",
    "search",
    "search_each",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
