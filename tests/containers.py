"""A Docker image made of this host's own files: its Python, NumPy, LiteRT and a few programs. Nothing is pulled."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.edgetpu_stand_in import write_stand_in

IMAGE = "foxnas-test-board:latest"
PROGRAMS = ("sh", "sleep", "env", "mktemp", "rm", "ln")
PACKAGES = ("numpy", "numpy.libs", "ai_edge_litert", "flatbuffers")
ENVIRONMENT = "ENV PATH=/usr/local/bin:/bin PYTHONPATH=/opt/packages"


@contextlib.contextmanager
def board_image(directory: Path) -> Iterator[str]:
    """The name of an image that can measure, and has the stand-in for Google's compiler; a skip without a daemon.

    Args:
        directory: Scratch space for its archive.
    """
    with docker_client() as client:
        compiler = write_stand_in(directory, "/bin/python3")
        import_image(client, IMAGE, directory / "image.tar", PACKAGES, ENVIRONMENT, compiler)
        yield IMAGE
        client.images.remove(IMAGE, force=True)


@contextlib.contextmanager
def docker_client() -> Iterator[Any]:
    """A client of this host's daemon; a skip without one."""
    docker = pytest.importorskip("docker")
    # Asked first: the SDK leaves sockets open where none answers.
    daemon = socket.socket(socket.AF_UNIX)
    try:
        daemon.connect("/var/run/docker.sock")
    except OSError:
        pytest.skip("no Docker daemon answers")
    finally:
        daemon.close()
    client = docker.from_env(timeout=600)
    try:
        yield client
    finally:
        client.close()


def import_image(
    client: Any, name: str, archive: Path, packages: Sequence[str], environment: str, compiler: Path | None = None
) -> None:
    """Make an image of this host's Python with some of its packages, without pulling anything."""
    _pack(archive, packages, compiler)
    repository, _, tag = name.partition(":")
    client.api.import_image_from_file(str(archive), repository=repository, tag=tag, changes=environment)
    archive.unlink()


def _pack(archive: Path, names: Sequence[str], compiler: Path | None) -> None:
    python, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    places = [path for name in names for entry in sys.path if (path := Path(entry or ".", name)).is_dir()]
    packages = list({path.name: path for path in reversed(places)}.values())
    programs = [Path(shutil.which(name) or name).resolve() for name in PROGRAMS]
    binaries = [path for root in (library / "lib-dynload", *packages) for path in root.rglob("*.so*")]
    with tarfile.open(archive, "w") as tar:
        for path in _libraries([python, *programs, *binaries]):
            tar.add(path.resolve(), str(path))
        tar.add(python)
        tar.add(
            library, filter=_without("site-packages", "dist-packages", "test", "ensurepip", "idlelib", "__pycache__")
        )
        for path in packages:
            tar.add(path, f"/opt/packages/{path.name}", filter=_without("tests", "__pycache__"))
        for name, path in zip(PROGRAMS, programs, strict=True):
            tar.add(path, f"/bin/{name}")
        if compiler is not None:
            tar.add(compiler, "/usr/local/bin/edgetpu_compiler")
        link, temporary = tarfile.TarInfo("bin/python3"), tarfile.TarInfo("tmp")
        link.type, link.linkname = tarfile.SYMTYPE, str(python)
        temporary.type, temporary.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(link)
        tar.addfile(temporary)


def _without(*names: str) -> Callable[[tarfile.TarInfo], tarfile.TarInfo | None]:
    return lambda entry: None if Path(entry.name).name in names else entry


def _libraries(binaries: Iterable[Path]) -> set[Path]:
    """What the dynamic linker loads for programs and libraries, and the linker itself; not what wheels bring along."""
    listed = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False).stdout
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", listed) if ".." not in path and ".libs/" not in path}
