"""From the parameter ``device`` to an open connection."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.devices._base import Connection
from foxnas_mlflow.devices._local import LocalConnection


def connect(device: str) -> Connection:
    """Open a connection to a machine that measures.

    Args:
        device: ``local``, ``ssh://user@host[:port]`` or ``docker://image``. The last two take
            ``?python=/path/to/python`` (on the machine), ssh also ``key=/path`` (of a private key).
            User, port, keys and jump hosts also come from ``~/.ssh/config``, keys from the agent.

    Raises:
        DeviceError: If the address is malformed, or the machine cannot be reached.
        MissingDependencyError: If the package for this kind of connection is not installed.
    """
    if device == "local":
        return LocalConnection()
    if device.startswith("docker://"):
        from foxnas_mlflow.devices._docker import DockerConnection

        image, _, query = device.removeprefix("docker://").partition("?")
        options = _options(device, query, ("python",))
        if image:
            return DockerConnection(device, image, python=options.get("python"))
    if device.startswith("ssh://"):
        from foxnas_mlflow.devices._ssh import SshConnection

        try:
            parts = urlsplit(device)
            port = parts.port
        except ValueError as error:
            raise _malformed(device) from error
        options = _options(device, parts.query, ("python", "key"))
        if parts.password is not None:
            raise DeviceError(
                "an ssh address has no password",
                received=device.replace(parts.password, "***"),
                remedy="use a key: ssh-keygen, then ssh-copy-id user@host",
            )
        if parts.hostname and parts.path in ("", "/") and not parts.fragment:
            return SshConnection(
                device,
                parts.hostname,
                port=port,
                user=parts.username,
                key=options.get("key"),
                python=options.get("python"),
            )
    raise _malformed(device)


def _options(device: str, query: str, known: tuple[str, ...]) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    if set(options) - set(known) or not all(options.values()):
        raise DeviceError(f"an address takes only {' and '.join(known)} after '?'", received=device)
    return options


def _malformed(device: str) -> DeviceError:
    return DeviceError(
        "a device is local, ssh://user@host[:port] or docker://image",
        received=device,
        remedy="give the machine's address",
    )
