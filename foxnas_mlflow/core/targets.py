"""Targets: the boards that a search aims at.

A target names the runtime and its settings, the search space that suits the hardware, and where
its reference predictors come from. Built-in ones are data; a user's own is the same as YAML.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from foxnas_mlflow.core.errors import InvalidInputError, UnknownTargetError
from foxnas_mlflow.core.files import sought

Int8Runtime = Literal["litert", "edgetpu"]
"""What executes TensorFlow Lite files of int8 networks."""

Runtime = Literal[Int8Runtime, "torch"]
"""What executes networks."""


@dataclass(frozen=True, slots=True)
class Target:
    """A board, its runtime, and how latency on it is defined.

    Attributes:
        name: Name used in tags and registered models: letters, digits, ``-`` and ``_``.
        description: One line for people.
        space: Search space: a built-in name or the path of a YAML file (in a target file: from its directory).
        runtime: What executes the network: ``litert``, ``edgetpu`` or ``torch``.
        threads: Threads of the runtime.
        batch: Images an inference.
        device: Default connection for measurements (``local``, ``ssh://user@host``), or empty.
        predictors: Predictors to use when none are given: ``reference`` (packaged), a path, or empty.
            They may know latency alone: a cost model of the board.
        latency_note: What the target's predicted milliseconds are, shown wherever they appear.
        machine: Regular expression that the name of a machine must match for its figures to count in a
            promotion; empty: any.
        file: Path that it was read from as it was given; of a built-in target empty. No key of the file.

    Examples:
        >>> from foxnas_mlflow import get_target
        >>> target = get_target("rpi4")
        >>> target.space, target.runtime, target.threads
        ('cpu', 'litert', 1)
    """

    name: str
    description: str = ""
    space: str = "cpu"
    runtime: Runtime = "litert"
    threads: int = 1
    batch: int = 1
    device: str = ""
    predictors: str = ""
    latency_note: str = ""
    machine: str = ""
    file: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.replace("-", "").replace("_", "").isalnum():
            raise UnknownTargetError("a target's name has only letters, digits, '-' and '_'", received=repr(self.name))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, str) and not isinstance(value, str):
                raise UnknownTargetError(
                    f"a target's {field.name} must be text",
                    received=repr(value),
                    remedy="put quotes around a number",
                )
        if self.runtime not in get_args(Runtime):
            raise UnknownTargetError("a target's runtime is litert, edgetpu or torch", received=repr(self.runtime))
        try:
            re.compile(self.machine)
        except re.error:
            raise UnknownTargetError(
                "a target's machine is a regular expression", received=repr(self.machine)
            ) from None
        for name in ("threads", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UnknownTargetError(f"a target's {name} must be a positive integer", received=repr(value))

    @property
    def argument(self) -> str:
        """What a command is given to name it, quoted: a target of a file has no name that others know."""
        return shlex.quote(self.file or self.name)

    @property
    def device_option(self) -> str:
        """What a command that measures is given besides, after a space, where the target has no device of its own."""
        return "" if self.device else " --device ssh://user@board"

    def int8_runtime(self, what: str) -> Int8Runtime:
        """What executes its int8 files.

        Args:
            what: Who makes them, for the message.

        Raises:
            InvalidInputError: If it executes none.
        """
        if self.runtime == "torch":
            raise InvalidInputError(
                f"{what} makes int8 files: the target's runtime must be litert or edgetpu",
                received=f"{self.name}: {self.runtime}",
            )
        return self.runtime

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `from_dict` reads."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "file"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Target:
        """Read a mapping; unknown keys are refused, a key without a value is as one that is not there.

        Raises:
            UnknownTargetError: If keys are unknown or a value breaks a rule.
        """
        known = [f.name for f in dataclasses.fields(cls) if f.name != "file"]
        if not isinstance(data, Mapping) or "name" not in data:
            raise UnknownTargetError("a target file is a mapping with at least the key 'name'", received=data)
        unknown = sorted(str(key) for key in data if key not in known)
        if unknown:
            raise UnknownTargetError(f"a target has only the keys {known}", received=f"also {unknown}")
        return cls(**{key: value for key, value in data.items() if value is not None or key == "name"})


_YAML = (".yaml", ".yml")

_PI_4 = r"Raspberry Pi (Compute Module )?4\b"

BUILTIN_TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            "rpi4",
            "Raspberry Pi 4 (Cortex-A72), int8 TFLite, batch 1",
            predictors="reference",
            machine=_PI_4,
            latency_note=(
                "milliseconds of the authors' setup of 2021 (TFLite int8 on a Raspberry Pi 4); "
                "today's LiteRT with XNNPACK is several times faster: calibrate from about ten probes on your board"
            ),
        ),
        *(
            Target(
                name,
                f"Coral Edge TPU ({host}), int8 TFLite, batch 1",
                space="tpu",
                runtime="edgetpu",
                predictors="reference",
                latency_note=(
                    f"milliseconds of a cost model of the Edge TPU ({host}) fitted to published figures, "
                    "about 5 % off on networks that it has not seen; nothing was measured on your board"
                ),
                machine=machine,
            )
            for name, host, machine in (
                ("edgetpu", "USB Accelerator on USB 3 of an x86 desktop", ""),
                ("edgetpu-devboard", "Coral Dev Board", ""),
                ("edgetpu-rpi4", "USB Accelerator on a Raspberry Pi 4", _PI_4),
            )
        ),
        *(
            Target(
                name,
                f"Arm {name}, int8 TFLite through Vela, batch 1",
                predictors="reference",
                latency_note="milliseconds estimated by Arm's compiler Vela; nothing was measured",
            )
            for name in ("ethos-u55-128", "ethos-u65-256")
        ),
        Target("cpu", "this host's CPU, int8 LiteRT, batch 1", device="local"),
        Target(
            "gpu",
            "this host's GPU, PyTorch fp32, batch 64 (the paper's table 3)",
            space="tpu",
            runtime="torch",
            batch=64,
            device="local",
        ),
    )
}


def get_target(name_or_path: str) -> Target:
    """A built-in target by name, or a user's from a YAML file.

    Raises:
        UnknownTargetError: If it is neither, or the file has the name of a built-in one.

    Examples:
        >>> from foxnas_mlflow import get_target
        >>> get_target("edgetpu").runtime
        'edgetpu'
    """
    if name_or_path in BUILTIN_TARGETS:
        return BUILTIN_TARGETS[name_or_path]
    path = Path(name_or_path)
    if path.suffix not in _YAML:
        raise UnknownTargetError(
            f"target must be one of {sorted(BUILTIN_TARGETS)} or the path of a YAML file", received=name_or_path
        )
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnknownTargetError("a target file must be readable", received=sought(path, error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnknownTargetError("a target file must be YAML", received=name_or_path) from error
    target = Target.from_dict(data)
    if target.name in BUILTIN_TARGETS:
        raise UnknownTargetError(
            "a target file has a name of its own: models are registered and judged by it",
            received=f"{name_or_path}, which names the built-in target {target.name}",
            remedy=f"choose another name, or give --target {target.name}",
        )
    # Files that a target names lie beside its own, wherever the command is typed.
    return dataclasses.replace(
        target,
        space=_beside(path, target.space, *_YAML),
        predictors=_beside(path, target.predictors, ".json"),
        file=name_or_path,
    )


def _beside(path: Path, name: str, *suffixes: str) -> str:
    return str(path.parent / name) if name.endswith(suffixes) and ":/" not in name else name


def named_beside(path: Path, space: str) -> str:
    """The space of a target that was read, as a target file at another path names it."""
    is_file = space.endswith(_YAML) and ":/" not in space and not Path(space).is_absolute()
    return os.path.relpath(Path(space).resolve(), path.parent.resolve()) if is_file else space
