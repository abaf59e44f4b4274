"""The run context ``foxnas``: tags that say where and with what a run was made.

MLflow asks every context provider at each `start_run`, of whatever project: so this module imports
nothing but the standard library, asks no server, and joins only where this package is at work.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from importlib import metadata

from mlflow.tracking.context.abstract_context import RunContextProvider

_LIBRARIES = ("ai-edge-litert", "mlflow", "numpy", "pillow", "statsmodels", "tensorflow", "tflite-runtime", "torch")
_AT_WORK = ("foxnas_mlflow.cli", "foxnas_mlflow.core", "foxnas_mlflow.flavor")


class FoxnasRunContext(RunContextProvider):
    """Host and libraries of the runs that this package has a part in."""

    def in_context(self) -> bool:
        """Whether a module of this package that does work has been imported.

        An environment often holds more than one project. A run that uses nothing of this one keeps
        the tags that it had; one that loads or logs a model of the flavor, searches or predicts
        has imported it before.
        """
        return any(module in sys.modules for module in _AT_WORK)

    def tags(self) -> dict[str, str]:
        """Tags ``foxnas.host.*`` and ``foxnas.library.*``."""
        return dict(_tags())


@functools.cache
def _tags() -> dict[str, str]:
    # Here, since a package of ours that is imported tells that it is at work.
    from foxnas_mlflow.core.processors import n_processors, processor_name

    # The name of the machine is left out: tracking servers are shared.
    tags = {
        "foxnas.host.cpu": processor_name(),
        "foxnas.host.machine": platform.machine(),
        "foxnas.host.system": platform.system(),
        "foxnas.host.cores": str(os.cpu_count() or 1),
        "foxnas.host.cores_available": str(n_processors()),
        # What the numerical libraries were told; empty means all cores.
        "foxnas.host.threads": os.environ.get("OMP_NUM_THREADS", ""),
        "foxnas.library.python": platform.python_version(),
    }
    for name in _LIBRARIES:
        try:
            tags[f"foxnas.library.{name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return tags
