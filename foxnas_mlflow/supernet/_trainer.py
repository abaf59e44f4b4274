"""The one training loop: every training here is its steps, with another strategy or another network.

The loop owns optimizer, learning rate, phases, averages, signals and checkpoints. What a step
computes is the strategy's (`foxnas_mlflow.supernet._strategy`).
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor

from foxnas_mlflow.core.errors import InvalidInputError, TrainingError, WorkerLostError
from foxnas_mlflow.supernet._distributed import GradientAverage, average_statistics, distributed, mean_over_ranks
from foxnas_mlflow.supernet._modes import resolved
from foxnas_mlflow.supernet._optimizer import (
    drop_waiting_gradients,
    set_learning_rate,
    set_velocities,
    sgd,
    velocities,
)
from foxnas_mlflow.supernet._signals import held_signals
from foxnas_mlflow.supernet._state import TrainingState
from foxnas_mlflow.supernet._step import Teacher, Workers, layout, set_gradients, update
from foxnas_mlflow.supernet._strategy import strategy_of
from foxnas_mlflow.supernet._style import OURS, Style
from foxnas_mlflow.supernet._threads import keep_to_processors

LOG_SECONDS = 1.0
"""Least time between two logs of the loss."""


class TrainingBatches(Protocol):
    """Batches that are a function of (epoch, index)."""

    def __len__(self) -> int:
        """Batches an epoch."""

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from index `start`: (n, c, s, s) float32 normalised, (n,) int64."""


@dataclass(frozen=True, slots=True)
class Observer:
    """Who is told of a training; each may be None.

    Attributes:
        log: Takes metrics (``train/loss``, ``train/images_per_s``, ``train/learning_rate``) and the
            step, about once a second.
        end_of_epoch: Called with the epochs done.
        on_checkpoint: Called with the path of each checkpoint written.
        progress: Called with steps done, all steps and the loss.
    """

    log: Callable[[Mapping[str, float], int], None] | None = None
    end_of_epoch: Callable[[int], None] | None = None
    on_checkpoint: Callable[[Path], None] | None = None
    progress: Callable[[int, int, float], None] | None = None


class Trainer:
    """Trains to the end of the configured epochs, from wherever the state is.

    With ``torch.distributed`` initialised, all ranks take the same networks and average their
    gradients; rank 0 writes checkpoints.

    Args:
        state: What is trained and how far it is; changed as training goes on.
        batches: Training batches.
        paths: Files for checkpoints, written in turn; none: no checkpoints.
        observer: Who is told.
        checkpoint_seconds: Seconds between checkpoints; the end of training writes one too.
        device: Where to compute.
        teacher: Probabilities for whole batches; networks without a teacher inside the training learn from
            them.
    """

    def __init__(
        self,
        state: TrainingState,
        batches: TrainingBatches,
        *,
        paths: Sequence[Path],
        observer: Observer,
        checkpoint_seconds: float,
        device: str,
        teacher: Teacher | None = None,
    ) -> None:
        self._state, self._batches = state, batches
        self._observer, self._device, self._outside = observer, device, teacher
        self._network = state.network.to(device).train()
        self._n_steps = state.config.epochs * len(batches)
        self._strategy = strategy_of(state.config)
        self._optimizer = sgd(self._network, state.config)
        set_velocities(self._network, self._optimizer, state.velocity)
        state.average = {name: t.to(device) for name, t in state.average.items()}
        self._teacher = self._inner_teacher()
        self._phase = self._strategy.phase(max(state.step - 1, 0), self._n_steps)
        # A resumed training begins with another file than the one that it may have read.
        first = state.step // max(len(batches), 1) % max(len(paths), 1)
        self._paths = itertools.islice(itertools.cycle(paths), first, None)
        self._checkpoint_seconds = checkpoint_seconds
        self._saved = self._logged = time.monotonic()
        self._seen = 0
        self._average = GradientAverage(self._network) if distributed() else None

    def run(self) -> None:
        """Train; the averaged weights, if there are any, are the network's in the end.

        Raises:
            TrainingError: If the loss is not finite; the last good checkpoint stays.
            WorkerLostError: If processes that read images ended; a checkpoint has what is done.
            InvalidInputError: If images cannot be read any more; a checkpoint has what is done.
        """
        keep_to_processors()
        state = self._state
        state.config = resolved(state, self._n_steps, lambda: next(self._batches.epoch(0)), self._teacher, self._device)
        with held_signals() as arrived, Workers(self._network, state.config.workers) as workers:
            try:
                stopped = self._run_epochs(workers, arrived)
            except (WorkerLostError, InvalidInputError):
                # What ends a service or a container is a signal to all its processes: the readers are gone first.
                stopped = bool(arrived)
                if not stopped:
                    self._checkpoint()
                    raise
            self._checkpoint()
        if stopped:
            # The handler that was there before decides what a signal means. Another rank's signal ends this one too.
            signal.raise_signal(arrived[0] if arrived else signal.SIGTERM)
        self._network.style = OURS
        if state.average:
            with torch.no_grad():
                for name, parameter in self._network.named_parameters():
                    parameter.copy_(state.average[name])

    def _run_epochs(self, workers: Workers, arrived: Sequence[signal.Signals]) -> bool:
        """Whether a signal ended the training before its last step."""
        state, batches = self._state, self._batches
        for epoch in range(state.step // len(batches), state.config.epochs):
            for images, targets in batches.epoch(epoch, start=state.step % len(batches)):
                self._step(images, targets, workers)
                if self._agreed(bool(arrived)):
                    return True
                if time.monotonic() - self._saved > self._checkpoint_seconds:
                    self._checkpoint()
            average_statistics(self._network)
            if self._observer.end_of_epoch is not None:
                self._observer.end_of_epoch(epoch + 1)
                self._network.train()
        return False

    def _step(self, images: Tensor, targets: Tensor, workers: Workers) -> None:
        state = self._state
        self._enter_phase()
        self._network.style = self._style()
        rate = set_learning_rate(self._optimizer, state.config, state.step, self._n_steps)
        images = images.to(self._device, memory_format=layout(state.config.mode))
        loss = set_gradients(
            state,
            images,
            targets.to(self._device),
            workers,
            phase=self._phase,
            teacher=self._teacher,
            answers=None if self._outside is None else self._outside(images),
            average=self._average,
        )
        drop_waiting_gradients(self._optimizer)
        value = update(state, mean_over_ranks(loss), self._optimizer)
        if not math.isfinite(value):
            raise TrainingError(
                "the loss must be finite",
                received=f"{value} at step {state.step}",
                remedy="lower the learning rate and resume from the last checkpoint",
            )
        state.step += 1
        self._seen += len(images)
        self._tell(value, rate)

    def _style(self) -> Style:
        """Activations and padding of the present step."""
        source, steps = self._network.style, self._state.config.anneal * self._n_steps
        return source.at(1 - self._state.step / steps) if self._state.step < steps else OURS

    def _enter_phase(self) -> None:
        phase = self._strategy.phase(self._state.step, self._n_steps)
        if phase != self._phase:
            self._phase = phase
            self._strategy.begin(phase, self._state, self._optimizer)
            self._teacher = self._inner_teacher()

    def _inner_teacher(self) -> Teacher | None:
        """The largest network as an earlier phase left it."""
        if not self._state.teacher:
            return None
        supernet = self._state.supernet
        largest = supernet.extract(supernet.space.largest())
        largest.load_state_dict(self._state.teacher)
        largest.to(self._device).eval()
        return lambda images: F.softmax(largest(images).float(), 1)

    def _tell(self, loss: float, rate: float) -> None:
        step = self._state.step
        if self._observer.progress is not None:
            self._observer.progress(step, self._n_steps, loss)
        elapsed = time.monotonic() - self._logged
        if self._observer.log is not None and (elapsed > LOG_SECONDS or step == self._n_steps):
            metrics = {"train/loss": loss, "train/images_per_s": self._seen / elapsed, "train/learning_rate": rate}
            self._observer.log(metrics, step)
            self._logged, self._seen = time.monotonic(), 0

    def _agreed(self, stop: bool) -> bool:
        """Whether any rank wants to stop: one that stopped alone would leave the others waiting."""
        if not distributed():
            return stop
        wanted = torch.tensor(float(stop), device=self._device)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return bool(wanted.item())

    def _checkpoint(self) -> None:
        self._saved = time.monotonic()
        path = next(self._paths, None)
        if path is None or (distributed() and dist.get_rank()):
            return
        self._state.velocity = velocities(self._network, self._optimizer)
        self._state.save(path)
        if self._observer.on_checkpoint is not None:
            self._observer.on_checkpoint(path)
