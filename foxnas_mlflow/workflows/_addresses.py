"""Where to measure, as it is typed: one address, or those of several boards that share the work."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from foxnas_mlflow.core.errors import DeviceError


def addresses(device: str) -> tuple[str, ...]:
    """The addresses of a comma separated list.

    Raises:
        DeviceError: If one machine is listed twice, under whatever user and options, or an address has a password.
    """
    listed = tuple(part.strip() for part in device.split(",") if part.strip())
    machines: dict[str, str] = {}
    for address in listed:
        _refuse_password(address)
        machine = _machine(address)
        if machine in machines:
            raise DeviceError(
                "a board is listed once: it measures one network at a time",
                received=f"{machines[machine]} and {address}" if machines[machine] != address else f"{address} twice",
                remedy="give each board's address once",
            )
        machines[machine] = address
    return listed


def _refuse_password(address: str) -> None:
    """Before there is a run that would keep the address; one that `mlflow run` has made keeps it already."""
    login = address.removeprefix("ssh://").partition("?")[0].rpartition("@")[0]
    if address.startswith("ssh://") and ":" in login:
        run_id = os.environ.get("MLFLOW_RUN_ID")
        kept = f"; mlflow has kept the address as a parameter of run {run_id}: change this password" if run_id else ""
        raise DeviceError(
            "an ssh address has no password",
            received=address,
            remedy=f"use a key: ssh-keygen, then ssh-copy-id user@host{kept}",
        )


def _machine(address: str) -> str:
    """What an address names, apart from user and options."""
    place = address.partition("?")[0]
    if not place.startswith("ssh://"):
        return place
    return urlsplit(place).netloc.rpartition("@")[2].removesuffix(":22").lower()


def is_here(address: str) -> bool:
    """Whether an address is that of this machine, which other work of this process disturbs."""
    return not address.startswith("ssh://")


def shown(device: str) -> str:
    """An address without its options, which may name a key."""
    return device.partition("?")[0]
