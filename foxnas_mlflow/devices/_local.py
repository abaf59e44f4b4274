"""``local``: this machine, through processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from foxnas_mlflow.devices._base import Completed, Connection, refused, timed_out


class LocalConnection(Connection):
    """This host. Models run in processes of their own, as on any other machine."""

    uri = "local"
    python = sys.executable
    install = "pip install 'foxnas-mlflow[device]'"

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        # The board script ends when its standard input does: also when this process is killed.
        reading, writing = os.pipe()
        try:
            completed = subprocess.run(  # noqa: S603
                list(argv), stdin=reading, capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            raise timed_out(argv, timeout_s, self.uri) from None
        except OSError as error:
            return Completed(127, "", f"{argv[0]}: {error.strerror}")
        finally:
            os.close(writing)
            os.close(reading)
        status = completed.returncode if completed.returncode >= 0 else 128 - completed.returncode
        return Completed(status, completed.stdout.decode(errors="replace"), completed.stderr.decode(errors="replace"))

    def put(self, data: bytes, path: str) -> None:
        try:
            Path(path).write_bytes(data)
        except OSError as error:
            raise refused("writing a file", str(error.strerror), self.uri) from error

    def get(self, path: str) -> bytes:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise refused("reading a file", str(error.strerror), self.uri) from error

    def _disconnect(self) -> None:
        pass
