"""How something is trained, how far it is, and the checkpoints of that.

A checkpoint is one safetensors file with everything that training needs to go on to the same
losses; what is drawn depends on (seed, step) only, so no generator's state is in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError
from foxnas_mlflow.core.files import write_atomically
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.supernet._network import PlainNetwork, Supernet
from foxnas_mlflow.supernet._strategy import STRATEGIES, TrainedNetwork
from foxnas_mlflow.supernet._style import Style

Mode = Literal["auto", "float32", "channels_last", "bfloat16"]

CHECKPOINT_FORMAT = 1
CHECKPOINTS = ("a.safetensors", "b.safetensors")
"""Written in turn: a torn or missing one leaves the other."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train.

    Attributes:
        strategy: Name of a class of `foxnas_mlflow.supernet._strategy`.
        epochs: Passes over the training images.
        learning_rate: Peak of the cosine schedule.
        momentum: Of SGD with Nesterov's correction.
        weight_decay: Of weights; batch norm and biases have none.
        label_smoothing: Share of the target spread over all classes.
        warmup: Share of the steps with a rising learning rate, at least one step; 0: none.
        clip_norm: Largest norm of the gradient.
        n_random: Random subnets in a sandwich step.
        ema: Decay of the averaged weights that training returns; 0 returns the last weights.
        mode: Number format and memory layout; ``auto`` times them at the start of a training of 100 steps or more.
        workers: Subnets of a step that are computed at the same time, on threads of their own; 0
            times it at the start.
        anneal: Share of the steps over which activations move from those of the network that the weights come
            from to ours.
        accumulate: Parts that a step's batch is computed in, for the memory of one part; batch norm sees a
            part at a time.
        class_weights: Weight of each class's images in the loss; empty: all alike.
        head_first: Share of the steps in which only the head, batch norm and biases learn: what known weights
            know is not overwritten by the gradients of a head that knows nothing yet.
        seed: Seed of the subnets.
    """

    strategy: str = "sandwich"
    epochs: int = 40
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    warmup: float = 0.1
    clip_norm: float = 2.0
    n_random: int = 2
    ema: float = 0.0
    mode: Mode = "auto"
    workers: int = 0
    anneal: float = 0.3
    accumulate: int = 1
    class_weights: tuple[float, ...] = ()
    head_first: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise InvalidInputError(f"strategy must be one of {list(STRATEGIES)}", received=self.strategy)
        if self.mode not in get_args(Mode):
            raise InvalidInputError(f"mode must be one of {list(get_args(Mode))}", received=self.mode)
        if self.epochs < 1:
            raise InvalidInputError("epochs must be positive", received=self.epochs)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InvalidInputError("learning_rate must be a positive number", received=self.learning_rate)
        if self.workers < 0:
            raise InvalidInputError("workers must not be negative", received=self.workers)
        if self.accumulate < 1:
            raise InvalidInputError("accumulate must be positive", received=self.accumulate)
        object.__setattr__(self, "class_weights", tuple(float(w) for w in self.class_weights))
        if not all(math.isfinite(w) and w > 0 for w in self.class_weights):
            raise InvalidInputError("class_weights must be positive numbers", received=self.class_weights)
        if not 0 <= self.head_first <= 1:
            raise InvalidInputError("head_first must be in [0, 1]", received=self.head_first)
        if not 0 <= self.anneal <= 1:
            raise InvalidInputError("anneal must be in [0, 1]", received=self.anneal)
        if not 0 <= self.ema < 1:
            raise InvalidInputError("ema must be in [0, 1)", received=self.ema)


@dataclass
class TrainingState:
    """A supernet, or one network alone, in training.

    Attributes:
        network: What is trained.
        config: How it is trained.
        step: Steps done.
        velocity: SGD's momentum by parameter name.
        teacher: Parameters of the largest network that teaches the later phases.
        average: Averaged parameters by name, with `TrainConfig.ema`.
        origin: What the batches are drawn from (data digest, batch size, seed), JSON values; a
            resumed training must have the same.
    """

    network: TrainedNetwork
    config: TrainConfig
    step: int = 0
    velocity: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    teacher: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    average: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def supernet(self) -> Supernet:
        """The network, where it is a supernet."""
        if not isinstance(self.network, Supernet):
            raise InvalidInputError("this training must be a supernet's", received=type(self.network).__name__)
        return self.network

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically."""
        tensors = {f"model.{name}": t for name, t in self.network.state_dict().items()}
        tensors |= {f"velocity.{name}": t for name, t in self.velocity.items()}
        tensors |= {f"teacher.{name}": t for name, t in self.teacher.items()}
        tensors |= {f"average.{name}": t for name, t in self.average.items()}
        state = {
            "format": CHECKPOINT_FORMAT,
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "space": self.network.space.to_dict() if isinstance(self.network, Supernet) else None,
            "origin": dict(self.origin),
            "style": self.network.style.to_dict(),
        }
        contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(contiguous, metadata={"foxnas": json.dumps(state)}))


def load_checkpoint(directory: Path, space: SearchSpace | None = None) -> TrainingState:
    """The newest whole checkpoint of a directory.

    Args:
        directory: Holds the files of `CHECKPOINTS`, or is one such file.
        space: Refuse a checkpoint of another space.

    Raises:
        InvalidInputError: If there is no whole checkpoint, or it belongs to another space.
    """
    paths = [directory] if directory.is_file() else [directory / name for name in CHECKPOINTS]
    states, damaged = [], []
    for path in paths:
        if path.is_file():
            try:
                states.append(_read(path))
            except (SafetensorError, InvalidFormatError, KeyError, ValueError, OSError) as error:
                damaged.append(f"{path.name}: {error}")
    if not states:
        raise InvalidInputError(
            "resume must name a run or directory with a whole checkpoint", received="; ".join(damaged) or str(directory)
        )
    state = max(states, key=lambda s: s.step)
    if space is not None and state.supernet.space.digest != space.digest:
        raise InvalidInputError(
            "a checkpoint must belong to the space that is trained",
            received=f"{state.supernet.space.name!r} with other settings",
            remedy="resume with the data, space and preset that it was begun with",
        )
    return state


def begun_with(path: Path) -> str:
    """Digest of the data that a checkpoint's training was begun with, or one of a directory; empty if unknown."""
    for file in [path] if path.is_file() else [path / name for name in CHECKPOINTS]:
        with contextlib.suppress(SafetensorError, OSError, KeyError, ValueError), safe_open(str(file), "pt") as opened:
            return str(json.loads((opened.metadata() or {})["foxnas"])["origin"]["data"])
    return ""


def load_alone(path: Path, network: PlainNetwork, config: TrainConfig) -> TrainingState:
    """The training of one network where its checkpoint left it; a new one where there is none that is whole."""
    state = TrainingState(network, config)
    try:
        saved, parts = _parts(path)
    except (SafetensorError, KeyError, ValueError, OSError):
        return state
    network.load_state_dict(parts["model"])
    state.step, state.velocity, state.average = saved["step"], parts["velocity"], parts["average"]
    return state


def _read(path: Path) -> TrainingState:
    saved, parts = _parts(path)
    if saved["format"] != CHECKPOINT_FORMAT:
        raise InvalidFormatError(
            f"a checkpoint must have format {CHECKPOINT_FORMAT}",
            received=saved["format"],
            remedy="read it with the release of foxnas-mlflow that wrote it",
        )
    supernet = Supernet(SearchSpace.from_dict(saved["space"]))
    supernet.load_state_dict(parts["model"])
    # Earlier releases could slow the first layers down.
    config = {key: value for key, value in saved["config"].items() if key != "layer_decay"}
    if "style" in saved:
        supernet.style = Style.from_dict(saved["style"])
    return TrainingState(
        supernet,
        TrainConfig(**config),
        saved["step"],
        parts["velocity"],
        parts["teacher"],
        parts["average"],
        saved.get("origin", {}),
    )


def _parts(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What a checkpoint says of itself, and its tensors by part and name."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        # Releases before 0.2 wrote the step alone for a network that is trained alone.
        saved = json.loads(metadata["foxnas"]) if "foxnas" in metadata else {"step": int(metadata["step"])}
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "velocity": {}, "teacher": {}, "average": {}}
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            part, _, name = key.partition(".")
            parts[part][name] = file.get_tensor(key)
    return saved, parts
