"""Training of the supernet: progressive shrinking (paper section 3.2) and the sandwich rule.

Both are one loop over steps; they differ in the subnets that a step trains and in who teaches.

- ``progressive_shrinking``: the largest network first, then elastic kernel, depth and expansion,
  one random subnet a step, taught by the largest network as it was when its phase ended.
- ``sandwich``: largest, smallest and random subnets in every step, both ends at any image size half of
  the time; all learn from the labels, the others also from the largest's answers in the same step
  (in-place distillation).

A checkpoint is one safetensors file with everything that training needs to go on to the same
losses; what is drawn depends on (seed, step) only, so no generator's state is in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.supernet._batches import Batches
from foxnas_mlflow.supernet._network import PlainNetwork, Supernet
from foxnas_mlflow.supernet._optimizer import set_velocities, sgd, velocities
from foxnas_mlflow.supernet._state import CHECKPOINTS, TrainConfig, TrainingState
from foxnas_mlflow.supernet._step import (
    Workers,
    distributed,
    fastest_mode,
    fastest_workers,
    layout,
    set_gradients,
    update,
)

# Where the phases of progressive shrinking begin, as shares of the epochs (once-for-all's
# proportions: the largest network takes most, elastic kernels least).
_PHASES = (0.0, 0.4, 0.52, 0.7)


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
    optimizer = sgd(
        supernet,
        learning_rate=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    set_velocities(supernet, optimizer, state.velocity)
    teacher = _teacher(state, device)
    if config.mode == "auto" or not config.workers:
        sample, targets = next(batches.epoch(0))
        if config.mode == "auto":
            mode = fastest_mode(supernet, sample, targets, device)
            config = state.config = dataclasses.replace(config, mode=mode)
        if not config.workers:
            sample = sample.to(device, memory_format=layout(config.mode))
            n_workers = fastest_workers(state, sample, targets.to(device), teacher)
            config = state.config = dataclasses.replace(config, workers=n_workers)
    state.average = {name: t.to(device) for name, t in state.average.items()}
    phase = _phase(config, state.step, n_steps)
    written = state.step // max(len(batches), 1)
    saved, logged, seen = time.monotonic(), time.monotonic(), 0
    rank = dist.get_rank() if distributed() else 0

    def checkpoint() -> None:
        nonlocal written, saved
        saved = time.monotonic()
        if rank:
            return
        state.velocity = velocities(supernet, optimizer)
        checkpoints.mkdir(parents=True, exist_ok=True)
        path = checkpoints / CHECKPOINTS[written % len(CHECKPOINTS)]
        state.save(path)
        written += 1
        if on_checkpoint is not None:
            on_checkpoint(path)

    with _held_signals() as arrived, Workers(supernet, config.workers) as workers:
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
                images = images.to(device, memory_format=layout(config.mode))
                mean = set_gradients(state, images, targets.to(device), phase, teacher, workers)
                loss = update(state, mean, optimizer)
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


def _largest(supernet: Supernet) -> PlainNetwork:
    return supernet.extract(supernet.space.largest())


def _teacher(state: TrainingState, device: str) -> PlainNetwork | None:
    if not state.teacher:
        return None
    teacher = _largest(state.supernet)
    teacher.load_state_dict(state.teacher)
    return teacher.to(device).eval()


@contextlib.contextmanager
def _held_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGTERM and SIGINT in the list, so that a step is never cut in the middle."""
    arrived: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        arrived.append(signal.Signals(signum))

    # What is ignored stays ignored: a shell starts its background jobs so, for Ctrl-C to reach others.
    held = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) != signal.SIG_IGN]
    previous = {s: signal.signal(s, handler) for s in held}
    try:
        yield arrived
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)
