"""Training of the supernet: progressive shrinking (paper section 3.2) and the sandwich rule.

Both are one loop over steps; they differ in the subnets that a step trains and in who teaches.

- ``progressive_shrinking``: the largest network first, then elastic kernel, depth and expansion,
  one random subnet a step, taught by the largest network as it was when its phase ended.
- ``sandwich``: largest, smallest and random subnets in every step, both ends at any image size half of
  the time; the largest learns from the labels, the others from the largest's answers in the same
  step (in-place distillation).

A checkpoint is one safetensors file with everything that training needs to go on to the same
losses; what is drawn depends on (seed, step) only, so no generator's state is in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the field's own name
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError
from foxnas_mlflow.core.files import write_atomically
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.supernet._batches import Batches
from foxnas_mlflow.supernet._network import PlainNetwork, Supernet

Strategy = Literal["progressive_shrinking", "sandwich"]
Mode = Literal["auto", "float32", "channels_last", "bfloat16"]

CHECKPOINT_FORMAT = 1
CHECKPOINTS = ("a.safetensors", "b.safetensors")
"""Written in turn: a torn or missing one leaves the other."""

# Where the phases of progressive shrinking begin, as shares of the epochs (once-for-all's
# proportions: the largest network takes most, elastic kernels least).
_PHASES = (0.0, 0.4, 0.52, 0.7)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train.

    Attributes:
        strategy: See the module.
        epochs: Passes over the training images.
        learning_rate: Peak of the cosine schedule.
        momentum: Of SGD with Nesterov's correction.
        weight_decay: Of weights; batch norm and biases have none.
        label_smoothing: Share of the target spread over all classes.
        warmup: Share of the steps with a rising learning rate.
        clip_norm: Largest norm of the gradient.
        n_random: Random subnets in a sandwich step.
        growth: Share of the steps over which the image sizes grow, from the smaller half of them to all:
            a small image teaches as much at first and costs less (EfficientNetV2's progressive
            learning; a deviation from the paper). 0: all sizes from the start.
        ema: Decay of the averaged weights that training returns; 0 returns the last weights.
        mode: Number format and memory layout; ``auto`` times them at the start.
        seed: Seed of the subnets.
    """

    strategy: Strategy = "sandwich"
    epochs: int = 40
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    warmup: float = 0.1
    clip_norm: float = 2.0
    n_random: int = 2
    growth: float = 2 / 3
    ema: float = 0.0
    mode: Mode = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise InvalidInputError(f"strategy must be one of {list(get_args(Strategy))}", received=self.strategy)
        if self.mode not in get_args(Mode):
            raise InvalidInputError(f"mode must be one of {list(get_args(Mode))}", received=self.mode)
        if self.epochs < 1:
            raise InvalidInputError("epochs must be positive", received=self.epochs)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InvalidInputError("learning_rate must be a positive number", received=self.learning_rate)
        if not 0 <= self.ema < 1:
            raise InvalidInputError("ema must be in [0, 1)", received=self.ema)
        if not 0 <= self.growth <= 1:
            raise InvalidInputError("growth must be in [0, 1]", received=self.growth)


@dataclass
class TrainingState:
    """A supernet in training.

    Attributes:
        supernet: The network.
        config: How it is trained.
        step: Steps done.
        velocity: SGD's momentum by parameter name.
        teacher: Parameters of the largest network that teaches the later phases.
        average: Averaged parameters by name, with `TrainConfig.ema`.
        origin: What the batches are drawn from (data digest, batch size, seed), JSON values; a
            resumed training must have the same.
    """

    supernet: Supernet
    config: TrainConfig
    step: int = 0
    velocity: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    teacher: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    average: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically."""
        tensors = {f"model.{name}": t for name, t in self.supernet.state_dict().items()}
        tensors |= {f"velocity.{name}": t for name, t in self.velocity.items()}
        tensors |= {f"teacher.{name}": t for name, t in self.teacher.items()}
        tensors |= {f"average.{name}": t for name, t in self.average.items()}
        state = {
            "format": CHECKPOINT_FORMAT,
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "space": self.supernet.space.to_dict(),
            "origin": dict(self.origin),
        }
        contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
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


def _read(path: Path) -> TrainingState:
    with safe_open(str(path), framework="pt") as file:
        metadata = json.loads((file.metadata() or {})["foxnas"])
        if metadata["format"] != CHECKPOINT_FORMAT:
            raise InvalidFormatError(
                f"a checkpoint must have format {CHECKPOINT_FORMAT}",
                received=metadata["format"],
                remedy="read it with the release of foxnas-mlflow that wrote it",
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "velocity": {}, "teacher": {}, "average": {}}
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            part, _, name = key.partition(".")
            parts[part][name] = file.get_tensor(key)
    supernet = Supernet(SearchSpace.from_dict(metadata["space"]))
    supernet.load_state_dict(parts["model"])
    config = TrainConfig(**metadata["config"])
    return TrainingState(
        supernet,
        config,
        metadata["step"],
        parts["velocity"],
        parts["teacher"],
        parts["average"],
        metadata.get("origin", {}),
    )


def train_supernet(
    state: TrainingState,
    batches: Batches,
    *,
    checkpoints: Path,
    log: Callable[[Mapping[str, float], int], None] | None = None,
    end_of_epoch: Callable[[int], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    checkpoint_seconds: float = 120.0,
    device: str = "cpu",
) -> Supernet:
    """Train to the end of the configured epochs, from wherever the state is.

    With ``torch.distributed`` initialised, all ranks take the same subnets and average their
    gradients; rank 0 writes checkpoints.

    Args:
        state: A new state, or one of `load_checkpoint`.
        batches: Training batches of the largest image size; smaller ones are resized from them.
        checkpoints: Directory of the checkpoints.
        log: Takes metrics (``train/loss``, ``train/images_per_s``, ``train/learning_rate``) and the
            step, about once a second.
        end_of_epoch: Called with the epochs done.
        on_checkpoint: Called with the path of each checkpoint written.
        progress: Called with steps done, all steps and the loss.
        checkpoint_seconds: Seconds between checkpoints; the end of training writes one too.
        device: Where to compute.

    Raises:
        InvalidInputError: If the loss is not finite; the last good checkpoint stays.
    """
    config, supernet = state.config, state.supernet.to(device).train()
    n_steps = config.epochs * len(batches)
    if config.mode == "auto":
        sample, targets = next(batches.epoch(0))
        config = state.config = dataclasses.replace(config, mode=fastest_mode(supernet, sample, targets, device))
    optimizer = _optimizer(state)
    teacher = _teacher(state, device)
    state.average = {name: t.to(device) for name, t in state.average.items()}
    phase = _phase(config, state.step, n_steps)
    written = state.step // max(len(batches), 1)
    saved, logged, seen = time.monotonic(), time.monotonic(), 0
    rank = dist.get_rank() if _distributed() else 0

    def checkpoint() -> None:
        nonlocal written, saved
        saved = time.monotonic()
        if rank:
            return
        names: dict[Tensor, str] = {parameter: name for name, parameter in supernet.named_parameters()}
        state.velocity = {
            names[p]: s["momentum_buffer"] for p, s in optimizer.state.items() if s.get("momentum_buffer") is not None
        }
        checkpoints.mkdir(parents=True, exist_ok=True)
        path = checkpoints / CHECKPOINTS[written % len(CHECKPOINTS)]
        state.save(path)
        written += 1
        if on_checkpoint is not None:
            on_checkpoint(path)

    with _held_signals() as arrived:
        for epoch in range(state.step // len(batches), config.epochs):
            for images, targets in batches.epoch(epoch, start=state.step % len(batches)):
                now = _phase(config, state.step, n_steps)
                if now != phase:
                    phase = now
                    if phase == 1:
                        state.teacher = {n: t.detach().clone() for n, t in _largest(supernet).state_dict().items()}
                        teacher = _teacher(state, device)
                    elif phase == 3:
                        supernet.sort_channels()
                        optimizer.state.clear()
                rate = _learning_rate(config, state.step, n_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                images = images.to(device, memory_format=_layout(config.mode))
                space = _open_sizes(config, supernet.space, state.step / n_steps)
                loss = _step(state, space, images, targets.to(device), phase, teacher, optimizer)
                if not math.isfinite(loss):
                    raise InvalidInputError(
                        "the loss must be finite",
                        received=f"{loss} at step {state.step}",
                        remedy="lower the learning rate and resume from the last checkpoint",
                    )
                state.step += 1
                seen += len(images)
                if progress is not None:
                    progress(state.step, n_steps, loss)
                elapsed = time.monotonic() - logged
                if log is not None and (elapsed > 1 or state.step == n_steps):
                    log(
                        {"train/loss": loss, "train/images_per_s": seen / elapsed, "train/learning_rate": rate},
                        state.step,
                    )
                    logged, seen = time.monotonic(), 0
                if arrived or time.monotonic() - saved > checkpoint_seconds:
                    checkpoint()
                if arrived:
                    break
            if arrived:
                break
            if end_of_epoch is not None:
                end_of_epoch(epoch + 1)
                supernet.train()
        else:
            checkpoint()
    if arrived:
        # The handler that was there before decides what a signal means.
        signal.raise_signal(arrived[0])
    if state.average:
        with torch.no_grad():
            for name, parameter in supernet.named_parameters():
                parameter.copy_(state.average[name])
    return supernet.eval()


def _step(
    state: TrainingState,
    space: SearchSpace,
    images: Tensor,
    targets: Tensor,
    phase: int,
    teacher: PlainNetwork | None,
    optimizer: torch.optim.Optimizer,
) -> float:
    """One update with subnets of a space; returns the mean loss over them."""
    config, supernet = state.config, state.supernet
    rng = np.random.default_rng([config.seed, 3, state.step])
    subnets = _subnets(config, space, phase, rng)
    optimizer.zero_grad(set_to_none=True)
    soft: Tensor | None = None
    losses = []
    for architecture in subnets:
        supernet.set_subnet(architecture)
        x = _resized(images, architecture.image_size)
        with _autocast(config.mode, x):
            if config.strategy == "progressive_shrinking" and teacher is not None:
                with torch.no_grad():
                    soft = F.softmax(teacher(x).float(), 1)
            logits = supernet(x).float()
        labelled = soft is None or config.strategy == "progressive_shrinking"
        terms = []
        if labelled:
            terms.append(F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing))
        if soft is not None:
            terms.append(F.cross_entropy(logits, soft))
        elif config.strategy == "sandwich":
            soft = F.softmax(logits.detach(), 1)
        loss = torch.stack(terms).sum() / len(subnets)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    parameters = [p for p in supernet.parameters() if p.grad is not None]
    if _distributed():
        _average_gradients(parameters)
    # A gradient that is not finite must not reach the weights, which the next checkpoint saves.
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm, foreach=True)
    # One transfer from the device a step.
    total, length = torch.stack([torch.stack(losses).sum(), norm]).tolist()
    if math.isfinite(total) and math.isfinite(length):
        optimizer.step()
        if config.ema:
            _update_average(state)
        return float(total)
    return math.nan


def _update_average(state: TrainingState) -> None:
    parameters = {name: p.detach() for name, p in state.supernet.named_parameters()}
    if not state.average:
        state.average = {name: p.clone() for name, p in parameters.items()}
        return
    # A short memory at first: the beginning must not weigh on a short training.
    decay = min(state.config.ema, (state.step + 1) / (state.step + 10))
    averages = [state.average[name] for name in parameters]
    torch._foreach_lerp_(averages, list(parameters.values()), 1 - decay)


def _subnets(config: TrainConfig, space: SearchSpace, phase: int, rng: np.random.Generator) -> list[Architecture]:
    if config.strategy == "sandwich":
        drawn = space.sample(rng, n=config.n_random)
        # Half of the time at any size: else small kernels would learn small images only, and large ones large images.
        any_size = [int(size) for size in rng.choice(space.image_sizes, 2)]
        largest, smallest = (None if rng.random() < 0.5 else size for size in any_size)
        return [space.largest(largest), space.smallest(smallest), *drawn]
    open_kernels, open_depths, open_expansions = phase >= 1, phase >= 2, phase >= 3
    limited = space.replace(
        kernels=space.kernels if open_kernels else space.kernels[-1:],
        depths=space.depths if open_depths else space.depths[-1:],
        expansions=space.expansions if open_expansions else space.expansions[-1:],
    )
    return list(limited.sample(rng, n=1))


def _open_sizes(config: TrainConfig, space: SearchSpace, progress: float) -> SearchSpace:
    """The space with the image sizes that are trained when a share of the steps is done."""
    sizes = space.image_sizes
    if progress >= config.growth:
        return space
    half = -(-len(sizes) // 2)
    return space.replace(image_sizes=sizes[: half + int((len(sizes) - half) * progress / config.growth + 0.5)])


def _phase(config: TrainConfig, step: int, n_steps: int) -> int:
    """Phase of progressive shrinking, 0 to 3; the sandwich rule has one phase, 0."""
    if config.strategy == "sandwich":
        return 0
    return sum(step >= share * n_steps for share in _PHASES) - 1


def _learning_rate(config: TrainConfig, step: int, n_steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = max(int(config.warmup * n_steps), 1)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(n_steps - warmup, 1)))


def _optimizer(state: TrainingState) -> torch.optim.SGD:
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in state.supernet.parameters():
        (decayed if parameter.ndim > 1 else rest).append(parameter)
    config = state.config
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True, foreach=True)
    parameters = dict(state.supernet.named_parameters())
    for name, velocity in state.velocity.items():
        parameter = parameters[name]
        optimizer.state[parameter]["momentum_buffer"] = velocity.to(parameter.device)
    return optimizer


def _largest(supernet: Supernet) -> PlainNetwork:
    return supernet.extract(supernet.space.largest())


def _teacher(state: TrainingState, device: str) -> PlainNetwork | None:
    if not state.teacher:
        return None
    teacher = _largest(state.supernet)
    teacher.load_state_dict(state.teacher)
    return teacher.to(device).eval()


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _layout(mode: Mode) -> torch.memory_format:
    return torch.contiguous_format if mode == "float32" else torch.channels_last


def _autocast(mode: Mode, x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=mode == "bfloat16")


def fastest_mode(supernet: Supernet, images: Tensor, targets: Tensor, device: str) -> Mode:
    """Time forward and backward of the largest network in each mode; another must win by 5 %."""
    supernet.set_subnet(supernet.space.largest())
    # Timing must leave no trace in the statistics.
    statistics = {name: t.clone() for name, t in supernet.named_buffers()}
    modes: tuple[Mode, ...] = ("float32", "channels_last", "bfloat16")
    times: dict[Mode, list[float]] = {mode: [] for mode in modes}
    y = targets.to(device)
    # In turns, so that a slow moment of the machine meets all of them; the first round warms up.
    for _ in range(6):
        for mode in modes:
            x = images.to(device, memory_format=_layout(mode))
            start = time.perf_counter()
            with _autocast(mode, x):
                loss = F.cross_entropy(supernet(x).float(), y)
            loss.backward()  # type: ignore[no-untyped-call]
            if x.is_cuda:
                torch.cuda.synchronize()
            times[mode].append(time.perf_counter() - start)
    seconds = {mode: float(np.median(taken[1:])) for mode, taken in times.items()}
    supernet.zero_grad(set_to_none=True)
    for name, buffer in supernet.named_buffers():
        buffer.copy_(statistics[name])
    best = min(modes, key=lambda mode: seconds[mode])
    return best if seconds[best] < 0.95 * seconds["float32"] else "float32"


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average over ranks in one message; all ranks used the same layers, so the lists agree."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


@contextlib.contextmanager
def _held_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGTERM and SIGINT in the list, so that a step is never cut in the middle."""
    arrived: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        arrived.append(signal.Signals(signum))

    previous = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield arrived
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)
