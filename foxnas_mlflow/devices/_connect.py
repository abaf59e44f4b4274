"""From the parameter ``device`` to an open connection."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl

from foxnas_mlflow.core.addresses import refuse_password
from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.devices._base import Connection
from foxnas_mlflow.devices._local import LocalConnection

_OPTIONS = {
    "local": ("edgetpu",),
    "ssh": ("python", "key", "edgetpu", "wait"),
    "docker": ("python", "cpus"),
}
"""What an address of each kind takes after ``?``."""


def connect(device: str) -> Connection:
    """Open a connection to a machine that measures.

    Args:
        device: ``local``, ``ssh://user@host[:port]`` or ``docker://image``. The last two take
            ``?python=/path/to/python`` (on the machine), ssh also ``key=/path`` (of a private key) and ``wait=180``
            (seconds that it is waited for when it was lost; 60), docker also ``cpus=0.5`` (processors that the
            container may use). ``local`` and ssh take ``edgetpu=usb:1``: which
            of several Edge TPUs, in the words of its library. The host's name is written as for ``ssh``: user,
            port, keys and jump hosts also come from ``~/.ssh/config`` and ``/etc/ssh/ssh_config``, keys from the agent.

    Raises:
        DeviceError: If the address is malformed, or the machine cannot be reached.
        MissingDependencyError: If the package for this kind of connection is not installed.
    """
    address, _, query = device.partition("?")
    if address == "local":
        options = _options(device, query, "local")
        connection: Connection = LocalConnection()
    elif address.startswith("docker://") and address != "docker://":
        from foxnas_mlflow.devices._docker import DockerConnection

        options = _options(device, query, "docker")
        # Docker's own least is a hundredth.
        cpus = _number(device, options, "cpus", "processors, 0.01 or more", 0.01)
        connection = DockerConnection(
            device, address.removeprefix("docker://"), python=options.get("python"), cpus=cpus
        )
    elif address.startswith("ssh://"):
        from foxnas_mlflow.devices._ssh import SshConnection, address_parts

        options = _options(device, query, "ssh")
        refuse_password(device)
        try:
            user, host, port = address_parts(device)
        except ValueError as error:
            raise _malformed(device) from error
        # Less than a second finds no restart.
        wait_s = _number(device, options, "wait", "seconds to wait for a lost board, 1 or more", 1)
        connection = SshConnection(
            device, host, port=port, user=user, key=options.get("key"), python=options.get("python")
        )
        connection.reconnect_seconds = wait_s
    else:
        raise _malformed(device)
    connection.edgetpu = options.get("edgetpu", "")
    return connection


def _options(device: str, query: str, kind: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    known = _OPTIONS[kind]
    if set(options) - set(known) or not all(options.values()):
        raise DeviceError(
            f"the address of {'this machine' if kind == 'local' else f'a {kind} machine'} takes only "
            f"{' and '.join(known)} after '?'",
            received=device,
        )
    return options


def _number(device: str, options: Mapping[str, str], name: str, meaning: str, least: float) -> float | None:
    if name not in options:
        return None
    try:
        number = float(options[name])
    except ValueError:
        number = -1.0
    if not least <= number < float("inf"):
        raise DeviceError(f"{name} must be a number of {meaning}", received=device)
    return number


def _malformed(device: str) -> DeviceError:
    return DeviceError(
        "a device is local, ssh://user@host[:port] or docker://image",
        received=device,
        remedy="give the machine's address; an IPv6 one stands in brackets: ssh://pi@[fe80::1]",
    )
