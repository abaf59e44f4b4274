"""What an address of a machine may say, and what a server says of one."""

from __future__ import annotations

import os

from foxnas_mlflow.core.errors import DeviceError

UNKNOWN_HOST = "invalid host header"
"""What a server says of an address that it was not started for; its status is that of a missing right."""


def refuse_password(address: str) -> None:
    """Refuse an ssh address with a password: before there is a run that would keep it.

    Raises:
        DeviceError: If it has one; it says which run keeps it already, where `mlflow run` has made one.
    """
    login = address.removeprefix("ssh://").partition("?")[0].rpartition("@")[0]
    if address.startswith("ssh://") and ":" in login:
        run_id = os.environ.get("MLFLOW_RUN_ID")
        kept = f"; mlflow has kept the address as a parameter of run {run_id}: change this password" if run_id else ""
        raise DeviceError(
            "an ssh address has no password",
            received=address,
            remedy=f"use a key: ssh-keygen, then ssh-copy-id user@host{kept}",
        )
