"""What every connection to a machine must do: carry bytes and arguments as they are, and clean up behind itself."""

from __future__ import annotations

import json
import random

import pytest

from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError
from foxnas_mlflow.devices import Connection

CONTENTS = (b"", b"\x00", bytes(range(256)), b"two\r\nlines\n", random.Random(0).randbytes(300_000))
"""Contents of files that a careless connection spoils: empty, binary, ends of lines, larger than a buffer."""

ARGUMENTS = (
    "two words",
    "",
    "it's",
    '"quoted"',
    "$HOME `id` $(id)",
    "*",
    "a;b|c&d>e",
    "one\ntwo",
    "gr\u00fcn",
    "--",
    "\\",
)
"""Arguments that a shell between would change."""


class ConnectionSuite:
    """Tests of a `Connection`; a subclass says which. The machine has Python and the usual commands of Unix."""

    def connection(self) -> Connection:
        """A newly opened connection; the suite closes it.

        Raises:
            NotImplementedError: If the subclass does not say which.
        """
        raise NotImplementedError

    def test_files_come_back_byte_by_byte(self) -> None:
        """What `put` wrote is what `get` reads and what the machine sees."""
        with self.connection() as connection:
            directory = connection.workspace({})
            for i, content in enumerate(CONTENTS):
                connection.put(content, f"{directory}/{i}")
                assert connection.get(f"{directory}/{i}") == content
                size = connection.run(["wc", "-c", f"{directory}/{i}"], timeout_s=60)
                assert int(size.stdout.split()[0]) == len(content)

    def test_a_file_is_replaced(self) -> None:
        """A shorter file leaves nothing of the longer one before it."""
        with self.connection() as connection:
            path = f"{connection.workspace({})}/file"
            connection.put(b"a long content", path)
            connection.put(b"short", path)
            assert connection.get(path) == b"short"

    def test_no_shell_interprets_arguments(self) -> None:
        """A program gets the arguments that were given."""
        with self.connection() as connection:
            done = connection.run(
                [connection.python, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *ARGUMENTS], timeout_s=60
            )
            assert done.status == 0, done.stderr
            assert json.loads(done.stdout) == list(ARGUMENTS)

    def test_status_and_both_outputs_are_told_apart(self) -> None:
        """Standard output, standard error, the exit status, and 128 + n after signal n."""
        with self.connection() as connection:
            code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
            done = connection.run([connection.python, "-c", code], timeout_s=60)
            assert (done.status, done.stdout.strip()) == (3, "out")
            assert "err" in done.stderr
            assert "out" not in done.stderr
            killed = connection.run(["sh", "-c", "kill -9 $$"], timeout_s=60)
            assert killed.status == 137
            assert connection.run(["/no/such/program"], timeout_s=60).status == 127

    def test_a_command_that_does_not_end_is_an_error(self) -> None:
        """It ends in time as an error of the device, and the connection still works."""
        with self.connection() as connection:
            with pytest.raises(DeviceError):
                connection.run(["sleep", "600"], timeout_s=0.5)
            assert connection.run(["true"], timeout_s=60).status == 0

    def test_what_the_machine_refuses_is_no_lost_connection(self) -> None:
        """A file that is not there, and a directory that is not there."""
        with self.connection() as connection:
            directory = connection.workspace({})
            for refused in (
                lambda: connection.get(f"{directory}/nothing"),
                lambda: connection.put(b"x", f"{directory}/no/such/file"),
            ):
                with pytest.raises(DeviceError) as caught:
                    refused()
                assert not isinstance(caught.value, ConnectionLostError)

    def test_nothing_is_left_behind(self) -> None:
        """The working directory is made once with its files, and is gone when the connection is closed."""
        with self.connection() as connection:
            directory = connection.workspace({"file": b"content"})
            assert connection.workspace({}) == directory
            assert connection.get(f"{directory}/file") == b"content"
        with self.connection() as connection:
            assert connection.run(["test", "-e", directory], timeout_s=60).status == 1

    def test_a_connection_is_opened_again(self) -> None:
        """After `reconnect` it works, in a directory of its own; the old one is gone."""
        with self.connection() as connection:
            before = connection.workspace({"file": b"content"})
            connection.reconnect()
            after = connection.workspace({})
            assert after != before
            assert connection.run(["test", "-e", before], timeout_s=60).status == 1
