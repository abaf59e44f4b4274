"""Directories of deployments, whose services end with the test."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from foxnas_mlflow.deploy.runner import delete
from tests.devices.sshd import Server, make_key, ssh_server


@contextlib.contextmanager
def board(root: Path) -> Iterator[str]:
    """The target URI of a board that is a directory."""
    try:
        yield f"edge://local?root={root}"
    finally:
        clear(root)


def clear(root: Path) -> None:
    """Delete all deployments."""
    for place in root.glob("*/versions"):
        delete(root, place.parent.name)


@contextlib.contextmanager
def ssh_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, slow: Path | None = None
) -> Iterator[tuple[str, Server]]:
    """The target URI of a board behind a real ssh server on loopback.

    While there is a file `slow`, a model stops half a kilobyte after it began to arrive.
    """
    pytest.importorskip("asyncssh")
    home, tools = tmp_path / "home", tmp_path / "tools"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    public = make_key(home / ".ssh" / "id_ed25519")
    if slow is not None:
        tools.mkdir()
        # Files travel through `cat`.
        (tools / "cat").write_text(
            f"""#!/bin/sh
case $(readlink /proc/$$/fd/1) in */.incoming-*/model.tflite)
  if test -e {slow}; then head -c 512; while test -e {slow}; do sleep 0.1; done; exit 1; fi
esac
exec /bin/cat "$@"
"""
        )
        (tools / "cat").chmod(0o755)
    with ssh_server(tmp_path / "sshd", public, env={"PATH": f"{tools}:{os.environ['PATH']}"}) as server:
        (home / ".ssh" / "known_hosts").write_text(server.known_hosts_line)
        user = os.environ.get("USER") or "root"
        with board(tmp_path / "board"):
            yield f"edge://{user}@127.0.0.1:{server.port}?python={sys.executable}&root={tmp_path / 'board'}", server


needs_sshd = pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="no OpenSSH server (openssh-server)")
