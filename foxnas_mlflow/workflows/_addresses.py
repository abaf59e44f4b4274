"""Where to measure, as it is typed: one address, or those of several boards that share the work."""

from __future__ import annotations

from urllib.parse import urlsplit

from foxnas_mlflow.core.addresses import refuse_password
from foxnas_mlflow.core.errors import DeviceError


def addresses(device: str) -> tuple[str, ...]:
    """The addresses of a comma separated list.

    Raises:
        DeviceError: If one machine is listed twice, under whatever user and options, or an address has a password.
    """
    listed = tuple(part.strip() for part in device.split(",") if part.strip())
    machines: dict[str, str] = {}
    for address in listed:
        refuse_password(address)
        machine = _machine(address)
        if machine in machines:
            raise DeviceError(
                "a board is listed once: it measures one network at a time",
                received=f"{machines[machine]} and {address}" if machines[machine] != address else f"{address} twice",
                remedy="give each board's address once",
            )
        machines[machine] = address
    return listed


def _machine(address: str) -> str:
    """What an address names, apart from user and options."""
    place = address.partition("?")[0]
    if not place.startswith("ssh://"):
        return place
    return urlsplit(place).netloc.rpartition("@")[2].removesuffix(":22").lower()


def is_here(address: str) -> bool:
    """Whether an address is that of this machine, which other work of this process disturbs."""
    return not address.startswith("ssh://")


def without_key(address: str) -> str:
    """An address with its options but the key."""
    return _without("key", address)


def where_measured(device: str) -> str:
    """Addresses as figures depend on them: not on how long a lost board is waited for."""
    return ",".join(_without("wait", address) for address in device.split(","))


def _without(name: str, address: str) -> str:
    place, _, options = address.partition("?")
    kept = "&".join(option for option in options.split("&") if option and not option.startswith(f"{name}="))
    return f"{place}?{kept}" if kept else place


def shown(device: str) -> str:
    """An address without its options, which may name a key."""
    return device.partition("?")[0]
