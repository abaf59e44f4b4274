"""Doctor: what is installed, what is missing for which command, and what answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from foxnas_mlflow.core.addresses import UNKNOWN_HOST
from foxnas_mlflow.workflows._request import Request, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow

if TYPE_CHECKING:
    import urllib.error

# Module, the distribution that brings it, and the extra of this package that installs it.
_TRAIN = (
    ("torch", "torch", "train"),
    ("safetensors", "safetensors", "train"),
    ("sklearn", "scikit-learn", "train"),
    ("PIL", "Pillow", "train"),
    ("matplotlib", "matplotlib", "train"),
)
_FIT = (("statsmodels", "statsmodels", "fit"), ("matplotlib", "matplotlib", "fit"))
_REPORT = (("plotly", "plotly", "report"),)
_RUNTIME = (("ai_edge_litert", "ai-edge-litert", "tflite"), ("flatbuffers", "flatbuffers", "tflite"))
_CONVERT = (("tensorflow", "tensorflow", "tflite"), *_RUNTIME)
_SERVE = (
    ("ai_edge_litert", "ai-edge-litert", "serve"),
    ("PIL", "Pillow", "serve"),
    ("safetensors", "safetensors", "serve"),
    ("httptools", "httptools", "serve"),
    ("uvloop", "uvloop", "serve"),
)
_STORE = (("sqlalchemy", "mlflow", "mlflow"),)

NEEDS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "supernet": _TRAIN,
    "sample": (*_TRAIN, *_RUNTIME),
    "fit": _FIT,
    "search": _REPORT,
    "quantize": (*_CONVERT, ("safetensors", "safetensors", "train")),
    "benchmark": _RUNTIME,
    "estimate": (("ethosu", "ethos-u-vela", "vela"),),
    "promote": (),
    "sign": (("model_signing", "model-signing", "sign"),),
    "main": (*_TRAIN, *_FIT, *_REPORT, *_CONVERT),
    "boards by ssh": (("asyncssh", "asyncssh", "device"),),
    "docker boards": (("docker", "docker", "device"),),
    "executor=ray": (("ray", "ray", "ray"),),
    "serving": _SERVE,
    "local store": _STORE,
}
"""What each command needs beyond the package's own requirements."""


@dataclass(frozen=True, kw_only=True)
class DoctorRequest(Request):
    """How long to ask; see `run_doctor`."""

    timeout_s: float = parameter(3.0, "Seconds to wait for the tracking server.", above=0)


@dataclass(frozen=True, kw_only=True)
class DoctorResult(Result):
    """What is there.

    Attributes:
        missing: Extras of this package that some command lacks.
    """

    missing: tuple[str, ...] = ()


def run_doctor(request: DoctorRequest) -> DoctorResult:
    """Tell what is there and what is not; nothing is changed or imported.

    Args:
        request: How long to ask.
    """
    missing = sorted({extra for needs in NEEDS.values() for module, _, extra in needs if not _installed(module)})
    lines = []
    for title, rows in (
        ("Installed", _versions()),
        ("Commands", _commands()),
        ("Tracking", _tracking(request.timeout_s)),
        ("Data and cache", _places()),
        ("Devices", _devices()),
    ):
        width = max(len(name) for name, _ in rows) + 2
        lines += [title, *(f"  {name:<{width}}{text}" for name, text in rows)]
    following = f"pip install 'foxnas-mlflow[{','.join(missing)}]'" if missing else "mlflow run . --env-manager local"
    return DoctorResult(run_id="", missing=tuple(missing), summary="\n".join([*lines, f"Next: {following}"]))


def _versions() -> list[tuple[str, str]]:
    import platform

    from foxnas_mlflow._version import __version__

    rows = [("foxnas-mlflow", __version__), ("Python", f"{platform.python_version()} on {platform.platform()}")]
    distributions = {d for needs in NEEDS.values() for _, d, _ in needs} | {"mlflow-skinny", "numpy", "pandas", "scipy"}
    return rows + [(name, _version(name) or "not installed") for name in sorted(distributions, key=str.lower)]


def _commands() -> list[tuple[str, str]]:
    rows = []
    for command, needs in NEEDS.items():
        absent = [(distribution, extra) for module, distribution, extra in needs if not _installed(module)]
        if absent:
            extras = ",".join(dict.fromkeys(extra for _, extra in absent))
            text = (
                f"lacks {', '.join(dict.fromkeys(name for name, _ in absent))}: pip install 'foxnas-mlflow[{extras}]'"
            )
        else:
            text = "ready"
        rows.append((command, text))
    return rows


def _tracking(timeout_s: float) -> list[tuple[str, str]]:
    import os

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    rows = [("tracking", f"{uri or 'MLFLOW_TRACKING_URI is not set: the store is in this folder'}")]
    if uri.startswith(("http://", "https://")):
        rows.append(("answer", _ask(uri, timeout_s)))
    elif not uri and _has_runs(Path("mlruns")):
        # As MLflow does: what is in that folder would else be lost from sight.
        rows.append(("store", f"{Path('mlruns').absolute()}, files of runs, which MLflow uses while they are there"))
    elif uri.startswith("sqlite:///") or not uri:
        rows.append(("store", _sqlite(uri.removeprefix("sqlite:///") or "mlflow.db")))
    else:
        rows.append(("store", "not asked: only http and sqlite can be asked without a login"))
    registry = os.environ.get("MLFLOW_REGISTRY_URI", "")
    return [*rows, ("registry", registry or "the tracking store's own")]


def _has_runs(folder: Path) -> bool:
    """Whether a folder has experiments of MLflow's file store."""
    return any(path.parent.name.isdigit() for path in folder.glob("*/meta.yaml"))


def _ask(uri: str, timeout_s: float) -> str:
    """What a tracking server says of itself."""
    import time
    import urllib.error
    import urllib.request

    start = time.monotonic()
    try:
        # The scheme was checked: http or https.
        question = urllib.request.Request(f"{uri.rstrip('/')}/version", headers=_login())  # noqa: S310
        with urllib.request.urlopen(question, timeout=timeout_s) as response:  # noqa: S310
            version = response.read(100).decode(errors="replace").strip()
    except urllib.error.HTTPError as error:
        if _knows_no_host(error):
            return "does not know the host name in this address: start it with --allowed-hosts NAME"
        return f"answers with status {error.code}: check the address and MLFLOW_TRACKING_USERNAME or _TOKEN"
    except (OSError, ValueError) as error:
        return f"does not answer: {getattr(error, 'reason', error)}"
    seconds = time.monotonic() - start
    return f"MLflow {version} answers in {seconds:.2f} s{_models(uri, timeout_s)}"


def _login() -> dict[str, str]:
    """The header that says who asks, as MLflow's client does."""
    import base64
    import os

    user, password, token = (os.environ.get(f"MLFLOW_TRACKING_{n}", "") for n in ("USERNAME", "PASSWORD", "TOKEN"))
    if user and password:
        return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
    return {"Authorization": f"Bearer {token}"} if token else {}


def _models(uri: str, timeout_s: float) -> str:
    """What keeps a tracking server from storing models, or nothing."""
    import urllib.error
    import urllib.request

    question = urllib.request.Request(  # noqa: S310
        f"{uri.rstrip('/')}/api/2.0/mlflow/logged-models/search",
        data=b'{"experiment_ids": ["0"], "max_results": 1}',
        headers={"Content-Type": "application/json", **_login()},
    )
    try:
        urllib.request.urlopen(question, timeout=timeout_s).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ", but cannot store models: it needs MLflow 3"
        if _knows_no_host(error):
            return ", but does not know the host name in this address: start it with --allowed-hosts NAME"
        if error.code in (401, 403):
            return f", but refuses this user (status {error.code}): check MLFLOW_TRACKING_USERNAME or _TOKEN"
        return f", but its models answer with status {error.code}"
    except (OSError, ValueError) as error:
        return f", but its models do not answer: {getattr(error, 'reason', error)}"
    return ""


def _knows_no_host(error: urllib.error.HTTPError) -> bool:
    """Whether a server refuses the address and not the user."""
    return UNKNOWN_HOST in error.read(1000).decode(errors="replace").lower()


def _sqlite(path: str) -> str:
    import os

    file = Path(path).absolute()
    if file.exists():
        state = "writable" if os.access(file, os.W_OK) else "read only"
        return f"{file}, {file.stat().st_size / 2**20:.1f} MiB, {state}"
    parent = file.parent
    return f"{file}, made by the first run" if os.access(parent, os.W_OK) else f"{parent} cannot be written to"


def _places() -> list[tuple[str, str]]:
    import shutil

    from foxnas_mlflow.core.files import cache_root

    fashion = Path("/usr/share/datasets/fashion-mnist")
    cache = cache_root()
    unfinished = [f"{sum(1 for _ in place.iterdir())} unfinished {place.name}" for place in _folders(cache)]
    free = shutil.disk_usage(cache if cache.exists() else Path.cwd()).free
    return [
        ("glyphs", "drawn from Matplotlib's fonts" if _installed("matplotlib") else "need matplotlib"),
        ("digits", "embedded" if _installed("sklearn") else "need scikit-learn"),
        ("fashion-mnist", str(fashion) if fashion.is_dir() else "not there: apt-get install dataset-fashion-mnist"),
        ("cache", f"{cache}: {', '.join(unfinished) or 'empty'}; {free / 2**30:.0f} GiB free"),
    ]


def _folders(cache: Path) -> list[Path]:
    return sorted(place for place in cache.iterdir() if place.is_dir()) if cache.is_dir() else []


def _devices() -> list[tuple[str, str]]:
    import ctypes.util
    import os
    import shutil

    from foxnas_mlflow.core.processors import processor_name

    library = ctypes.util.find_library("edgetpu")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    tools = [
        ("ssh", "boards at ssh://user@host"),
        ("docker", "boards at docker://image"),
        ("edgetpu_compiler", "compiling for the Coral Edge TPU"),
    ]
    return [
        ("this host", f"{processor_name()}, {_cores()}{load}"),
        *((tool, shutil.which(tool) or f"not installed; needed for {what}") for tool, what in tools),
        ("libedgetpu", library or "not installed; needed to run on a Coral Edge TPU of this host"),
    ]


def _cores() -> str:
    """Processors, and those of them that this process has."""
    import os

    from foxnas_mlflow.core.processors import n_processors, quota_processors

    there, quota = os.cpu_count() or 1, quota_processors()
    words = f"{there} cores" if n_processors() == there else f"{n_processors()} of {there} cores"
    return words if quota is None or quota >= there else f"{words}, a quota of {quota:g} processors"


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


WORKFLOW = Workflow(
    "doctor",
    "Tell what is installed, what each command lacks, and whether store, data and device tools are there.",
    DoctorRequest,
    run_doctor,
    entry_point=False,
)
