"""A virtual Raspberry Pi: Debian for arm64 under qemu-user, behind a real sshd on loopback.

Made without an image: packages are downloaded and unpacked, none of their scripts run. What firmware
and kernel of a Pi tell (/proc/cpuinfo, /sys, vcgencmd) is made up; with the files of an x86 host
LiteRT crashes there, with none it runs without XNNPACK. Results are those of a Cortex-A72, times
mean nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from foxnas_mlflow.core.files import cache_directory

SUITE = "bookworm"
PYTHON = "/opt/foxnas/bin/python"
"""The Python that has LiteRT; plain python3 has NumPy only, python3-bare nothing."""

OLD_PYTHON = "/opt/old/bin/python"
"""The Python that has tflite-runtime and NumPy 1.26."""

SMALL = "/small"
"""A file system with 64 KiB."""

ACCOUNTS = ("noisy", "fish", "dash", "spaced")
"""Accounts with root's rights whose shells and homes are those of boards as they are found."""

# qemu 7.2's own "max" computes wrong int8 results.
ENVIRONMENT = {"QEMU_CPU": "cortex-a72"}

BINFMT = Path("/proc/sys/fs/binfmt_misc")
CORES = 4

# What follows happens in a mount namespace of its own: nothing is left when its processes have ended.
_ENTER = """
mount -t proc proc "$1/proc"
mount --bind "$1/etc/pi-cpuinfo" "$1/proc/cpuinfo"
mount --rbind /dev "$1/dev"
mount --rbind /sys/fs/cgroup "$1/sys/fs/cgroup"
mount -t tmpfs -o size=64k tmpfs "$1/small"
if test -n "$2"; then mount -t tmpfs -o "$2" tmpfs "$1/tmp"; fi
root=$1
shift 2
exec chroot "$root" "$@"
"""


class UnavailableError(Exception):
    """Why there is no virtual Pi here."""


def enter(root: Path, *, tmp: str = "") -> list[str]:
    """The command that runs another one on the Pi; `tmp` are options of a /tmp of its own (``ro``)."""
    return ["unshare", "--mount", "sh", "-euc", _ENTER, "sh", str(root), tmp]


def unpack_virtual_pi(root: Path) -> None:
    """Make the root file system, from what an earlier session has kept.

    Making it downloads 130 packages, for a minute or more. It is kept packed (450 MB) in
    ``~/.cache/foxnas_mlflow/tests`` (or below ``XDG_CACHE_HOME``), until this module changes.

    Raises:
        UnavailableError: If something is missing on this host.
    """
    _require_emulator()
    kept = cache_directory("tests") / f"pi-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}.tar"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
            _make_virtual_pi(Path(directory, "root"))
            _run("tar", "-c", "-f", f"{directory}/pi.tar", "-C", f"{directory}/root", ".")
            Path(directory, "pi.tar").rename(kept)
        for old in set(kept.parent.glob("pi-*.tar")) - {kept}:
            old.unlink(missing_ok=True)
    root.mkdir(parents=True)
    _run("tar", "-x", "-f", str(kept), "-C", str(root))


def _make_virtual_pi(root: Path) -> None:
    root.mkdir()
    _run("debootstrap", "--download-only", "--arch=arm64", "--variant=minbase", "--include=python3,openssh-server,fish",
         SUITE, str(root))  # fmt: skip
    packages = sorted((root / "var" / "cache" / "apt" / "archives").glob("*.deb"))
    # With usr merged, as its packages expect.
    for name in ("bin", "sbin", "lib"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in packages:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as archive:
            _run("tar", "-x", "--keep-directory-symlink", "-C", str(root), stdin=archive.stdout)
        package.unlink()
    for directory in ("run/sshd", "small", "root", "tmp", "var/tmp", "sys/fs/cgroup", "home/my board"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    for directory in ("tmp", "var/tmp"):
        (root / directory).chmod(0o1777)
    site = "usr/local/lib/python3.11/dist-packages"
    _pip(root / site, "numpy")
    _pip(root / "opt" / "foxnas" / "packages", "ai-edge-litert")
    _pip(root / "opt" / "old" / "packages", "tflite-runtime==2.14.0", "numpy==1.26.4")
    for path, text in _files().items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
        if text.startswith("#!"):
            (root / path).chmod(0o755)


def _files() -> Mapping[str, str]:
    cpus = f"0-{CORES - 1}\n"
    processor = (
        "processor\t: {}\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\n"
        "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n"
    )
    files = {
        "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        # Accounts of boards as they are found.
        "noisy:x:0:0::/home/noisy:/bin/bash\n"
        "fish:x:0:0::/root:/usr/bin/fish\n"
        "dash:x:0:0::/root:/bin/dash\n"
        "spaced:x:0:0::/home/my board:/bin/sh\n",
        "home/noisy/.bashrc": "echo 'Welcome to your board!'\n",
        "home/my board/bin/python": f'#!/bin/sh\nexec {PYTHON} "$@"\n',
        "etc/group": "root:x:0:\nnogroup:x:65534:\n",
        "etc/shadow": "".join(f"{name}:*:19000:0:99999:7:::\n" for name in ("root", *ACCOUNTS))
        + "sshd:!:19000::::::\n",
        "etc/pi-cpuinfo": "".join(processor.format(i) for i in range(CORES))
        + "Revision\t: c03114\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n",
        "etc/pi-throttled": "0x0\n",
        "usr/bin/vcgencmd": '#!/bin/sh\necho "throttled=$(cat /etc/pi-throttled)"\n',
        "usr/bin/python3-bare": '#!/bin/sh\nexec python3 -S "$@"\n',
        PYTHON[1:]: '#!/bin/sh\nPYTHONPATH=/opt/foxnas/packages exec python3 "$@"\n',
        OLD_PYTHON[1:]: '#!/bin/sh\nPYTHONPATH=/opt/old/packages exec python3 "$@"\n',
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48312\n",
        **{f"sys/devices/system/cpu/{name}": cpus for name in ("possible", "present", "online")},
    }
    for i in range(CORES):
        directory = f"sys/devices/system/cpu/cpu{i}/cpufreq"
        files[f"{directory}/scaling_governor"] = "ondemand\n"
        files[f"{directory}/scaling_cur_freq"] = files[f"{directory}/cpuinfo_max_freq"] = "1500000\n"
    return files


def _pip(target: Path, *packages: str) -> None:
    platforms = (
        "manylinux2014_aarch64",
        "manylinux_2_17_aarch64",
        "manylinux_2_27_aarch64",
        "manylinux_2_28_aarch64",
        "manylinux_2_34_aarch64",
    )
    _run(
        *(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--target",
            str(target),
        ),
        *(part for platform in platforms for part in ("--platform", platform)),
        *("--python-version", "3.11", "--implementation", "cp", *packages),
    )


def _require_emulator() -> None:
    if os.geteuid() != 0:
        raise UnavailableError("a virtual Pi needs root (mount namespaces, chroot)")
    missing = [name for name in ("debootstrap", "dpkg-deb", "unshare", "update-binfmts") if shutil.which(name) is None]
    if missing:
        raise UnavailableError(f"a virtual Pi needs {', '.join(missing)}")
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], capture_output=True, check=False)
    if not (BINFMT / "qemu-aarch64").exists():
        subprocess.run(["update-binfmts", "--enable", "qemu-aarch64"], capture_output=True, check=False)
    if not (BINFMT / "qemu-aarch64").exists():
        raise UnavailableError("this kernel runs no arm64 programs (qemu-user-static, binfmt-support)")


def _run(*command: str, stdin: object = None) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=600, stdin=stdin)  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or getattr(error, "stdout", None) or b""
        reason = output.decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
        raise UnavailableError(f"{command[0]} failed: {reason[0]}") from error
