"""Init: an MLflow project that runs the installed package from a directory of its own."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._request import Request, parameter
from foxnas_mlflow.workflows._workflow import AnyWorkflow, Result, Workflow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class InitRequest(Request):
    """Where to write; see `run_init`."""

    directory: str = parameter("", "Directory to write MLproject, conda.yaml and uv.toml to.", positional=True)
    overwrite: bool = parameter(False, "Write anew what is there and differs.")

    def check(self) -> None:
        """A directory is named."""
        if not self.directory:
            raise InvalidInputError("directory must be named", remedy="give one: foxnas init my-project")


@dataclass(frozen=True, kw_only=True)
class InitResult(Result):
    """A project.

    Attributes:
        files: Paths of its files.
    """

    files: Sequence[str]


def run_init(request: InitRequest) -> InitResult:
    """Write a project that ``mlflow run`` takes.

    Args:
        request: Where to write.

    Raises:
        InvalidInputError: If a file is there that differs; nothing is written then.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from foxnas_mlflow import InitRequest, run_init
        >>> directory = Path(tempfile.mkdtemp(), "project")
        >>> _ = run_init(InitRequest(directory=str(directory)))
        >>> sorted(path.name for path in directory.iterdir())
        ['MLproject', 'conda.yaml', 'uv.toml']
    """
    from pathlib import Path

    from foxnas_mlflow.core.files import write_atomically

    directory = Path(request.directory)
    texts = project_files(directory)
    differing = [
        name
        for name, text in texts.items()
        if (directory / name).exists() and (directory / name).read_text(encoding="utf-8") != text
    ]
    if differing and not request.overwrite:
        raise InvalidInputError(
            "a project is written where none is",
            received=f"another {differing[0]} in {directory}",
            remedy="give another directory, or --overwrite",
        )
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(directory / name, text)
    return InitResult(
        run_id="",
        files=[str(directory / name) for name in texts],
        summary=f"Wrote {', '.join(texts)} to {directory}.\nNext: mlflow run {directory} --env-manager local",
    )


def project_files(directory: Path) -> Mapping[str, str]:
    """The files of a project, by name: its own copy in a checkout, elsewhere one that installs the package."""
    from foxnas_mlflow.workflows import WORKFLOWS

    is_checkout = (directory / "foxnas_mlflow" / "__init__.py").is_file()
    return {
        "MLproject": _mlproject([workflow for workflow in WORKFLOWS if workflow.entry_point]),
        "conda.yaml": _conda([] if is_checkout else [_own_requirement()]),
        "uv.toml": _UV,
    }


_WRITTEN = "# Written by: foxnas init DIR --overwrite\n"

_UV = f"""{_WRITTEN}[pip]
# Without an NVIDIA GPU the CPU build of PyTorch: the other one brings gigabytes of CUDA along.
torch-backend = "auto"
"""


def _mlproject(workflows: Sequence[AnyWorkflow]) -> str:
    lines = [f"{_WRITTEN}name: foxnas_mlflow", "", "conda_env: conda.yaml", "", "entry_points:"]
    for workflow in workflows:
        lines += _entry_point(workflow.name, f"python -m foxnas_mlflow {workflow.name}", workflow, [])
        if workflow.torchrun:
            options = " ".join(f"--{name.replace('_', '-')} {{{name}}}" for name, _ in TORCHRUN)
            command = f"python -m torch.distributed.run --rdzv-backend c10d {options} -m foxnas_mlflow {workflow.name}"
            lines += _entry_point(f"{workflow.name}_torchrun", command, workflow, TORCHRUN)
    return "\n".join(lines) + "\n"


TORCHRUN = (("nnodes", "1"), ("nproc_per_node", "auto"), ("rdzv_endpoint", "localhost:0"))
"""Parameters of torchrun's own, with what trains on all GPUs, or processors, of one machine."""


def _entry_point(name: str, command: str, workflow: AnyWorkflow, before: Sequence[tuple[str, str]]) -> Iterator[str]:
    names = [(p.name, p.default_text) for p in workflow.request.parameters()]
    yield f"  {name}:"
    yield "    parameters:"
    for name, default in [*before, *names]:
        yield f"      {name}: {{type: string, default: {_scalar(default)}}}"
    options = " ".join(f"--{name.replace('_', '-')} {{{name}}}" for name, _ in names)
    yield "    command: >-"
    yield textwrap.fill(
        f"{command} {options}",
        width=120,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _scalar(text: str) -> str:
    """A text in YAML, quoted where it would be read as something else."""
    import yaml

    return text if yaml.safe_load(text) == text else json.dumps(text)


def _conda(own: Sequence[str]) -> str:
    from foxnas_mlflow.core.pins import pins

    packages = [*own, *(f"{name}=={version}" for name, version in pins().items())]
    lines = ["name: foxnas", "channels:", "  - conda-forge", "dependencies:", "  - python=3.11", "  - pip", "  - pip:"]
    return _WRITTEN + "\n".join(lines + [f"      - {package}" for package in packages]) + "\n"


def _own_requirement() -> str:
    """What installs this very package: the wheel, checkout or repository that it came from, or its release."""
    import importlib.metadata

    try:
        origin = importlib.metadata.distribution("foxnas-mlflow").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        origin = None
    if origin is None:
        from foxnas_mlflow._version import __version__

        return f"foxnas-mlflow=={__version__}"
    told = json.loads(origin)
    vcs = told.get("vcs_info")
    return "foxnas-mlflow @ " + (f"{vcs['vcs']}+{told['url']}@{vcs['commit_id']}" if vcs else told["url"])


WORKFLOW = Workflow(
    "init",
    "Write an MLflow project to a directory, from where mlflow run uses the installed package.",
    InitRequest,
    run_init,
    entry_point=False,
)
