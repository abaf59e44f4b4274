"""From the parameter ``device`` to an open connection."""

from __future__ import annotations

from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.devices._base import Connection
from foxnas_mlflow.devices._local import LocalConnection


def connect(device: str) -> Connection:
    """Open a connection to a machine that measures.

    Args:
        device: ``local``, ``ssh://user@host[:port]`` or ``docker://image``.

    Raises:
        DeviceError: If the address is malformed, or the machine cannot be reached.
        MissingDependencyError: If the package for this kind of connection is not installed.
    """
    if device == "local":
        return LocalConnection()
    raise DeviceError(
        "a device is local, ssh://user@host[:port] or docker://image",
        received=device,
        remedy="give the machine's address",
    )
