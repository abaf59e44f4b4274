"""One update of what is trained: the step's networks, their gradients, and the change of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor, nn

from foxnas_mlflow.core.random import Stream, listed_stream
from foxnas_mlflow.supernet._distributed import GradientAverage, add_gradient
from foxnas_mlflow.supernet._optimizer import Sgd
from foxnas_mlflow.supernet._state import Mode, TrainingState
from foxnas_mlflow.supernet._strategy import TrainedNetwork, strategy_of

Teacher = Callable[[Tensor], Tensor]
"""Gives probabilities (n, n_classes) for normalised images (n, channels, height, width)."""


class Workers:
    """Threads that share the processor and compute one subnet of a step each.

    PyTorch divides every operator among all threads. On small images most operators are too small
    for that: one thread for each of two subnets is faster than two threads for both.

    Args:
        network: What is trained, on its device.
        n: Number of workers; 1 computes one subnet after another with all threads.
    """

    def __init__(self, network: TrainedNetwork, n: int) -> None:
        self._copies: list[Any] = [network]
        self._threads = torch.get_num_threads()
        self._pool = (
            ThreadPoolExecutor(n, "foxnas", torch.set_num_threads, (max(self._threads // n, 1),)) if n > 1 else None
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            # Threads that start later would take the workers' number.
            torch.set_num_threads(self._threads)

    @property
    def one_by_one(self) -> bool:
        """Whether a step's networks are computed one after another."""
        return self._pool is None

    def copies(self, n: int) -> list[Any]:
        """Modules for each of n networks: the trained one and aliases of it.

        Threads with parameters in common would wait for each other for ever: PyTorch locks a parameter
        to join it to a graph, and takes Python's lock in there.
        """
        while len(self._copies) < n:
            self._copies.append(self._copies[0].alias())
        return self._copies[:n]

    def run(self, function: Callable[[int], None], n: int, awaited: list[Future[Tensor]]) -> None:
        """Call a function with 0 to n - 1.

        Args:
            function: What to call.
            n: How often.
            awaited: Values that the first call sets and the others may wait for.
        """
        if self._pool is None:
            for i in range(n):
                function(i)
            return
        tasks = [self._pool.submit(function, i) for i in range(n)]
        # Nobody waits for a value that a failed call did not set.
        tasks[0].add_done_callback(lambda _: [value.cancel() for value in awaited])
        for task in tasks:
            task.result()


def set_gradients(
    state: TrainingState,
    images: Tensor,
    targets: Tensor,
    workers: Workers,
    *,
    phase: int = 0,
    teacher: Teacher | None = None,
    answers: Tensor | None = None,
    average: GradientAverage | None = None,
) -> Tensor:
    """Compute a step's networks; their mean loss, its gradient left in the trained parameters.

    Running statistics are those of the first network, the largest in a sandwich.

    Args:
        state: What is trained.
        images, targets: The step's batch: (n, channels, size, size), (n,).
        workers: Compute the networks.
        phase: The strategy's phase.
        teacher: Answers the images that each network sees, for those that no network of the step teaches.
        answers: Probabilities (n, n_classes) of a teacher that has seen the whole images, for those that
            have no other.
        average: Averages the gradients over ranks as they come; needs workers that compute one by one.
    """
    config, strategy = state.config, strategy_of(state.config)
    rng = listed_stream(config.seed, Stream.TRAINED_SUBNETS, state.step)
    networks = strategy.prepare(state.network, workers.copies, phase, rng)
    # In parts, for memory: every part adds its share of the batch's mean, and has two images at least for batch norm.
    parts = torch.arange(len(images)).tensor_split(min(config.accumulate, max(len(images) // 2, 1)))
    losses: list[Tensor] = [images.new_zeros(())] * len(networks)
    first: list[Future[Tensor]] = [Future() for _ in parts]
    weights = torch.tensor(config.class_weights, device=images.device) if config.class_weights else None
    if average is not None:
        average.begin(networks, len(parts))

    def compute(i: int) -> None:
        networks[i].zero_grad(set_to_none=True)
        for part, given in zip(parts, first, strict=True):
            whole = len(part) == len(images)
            x, y = (images, targets) if whole else (images[part], targets[part])
            x = resized(x, networks[i].image_size)
            soft = None
            with autocast(config.mode, x):
                if teacher is not None:
                    with torch.no_grad():
                        soft = teacher(x)
                logits = networks[i](x).float()
            if strategy.first_teaches and i:
                soft = given.result()
            elif strategy.first_teaches:
                given.set_result(F.softmax(logits.detach(), 1))
            if soft is None and answers is not None:
                soft = answers if whole else answers[part]
            loss = _loss(logits, y, soft, config.label_smoothing, weights) / len(networks)
            if not i:
                loss = strategy.first_weight * loss
            if not whole:
                loss = loss * (len(part) / len(images))
            loss.backward()  # type: ignore[no-untyped-call]
            losses[i] = losses[i] + loss.detach()

    workers.run(compute, len(networks), first)
    for parameter, *others in zip(*(network.parameters() for network in networks), strict=True):
        # In one order, so that a resumed training comes to the same sums.
        for other in others:
            add_gradient(parameter, other)
    if average is not None:
        average.finish()
    return torch.stack(losses).sum()


def update(state: TrainingState, loss: Tensor, optimizer: Sgd) -> float:
    """Change the weights by the gradients that `set_gradients` left.

    Args:
        state: What is trained.
        loss: The step's mean loss.
        optimizer: Of the trained parameters.

    Returns:
        The loss; NaN if it or the gradient is not finite, and nothing is updated then: the next
        checkpoint saves these weights.
    """
    parameters = [p for p in state.network.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, state.config.clip_norm, foreach=True)
    # One transfer from the device a step.
    total, length = torch.stack([loss, norm]).tolist()
    if math.isfinite(total) and math.isfinite(length):
        optimizer.step()
        if state.config.ema:
            _update_average(state)
        return float(total)
    return math.nan


def layout(mode: Mode) -> torch.memory_format:
    """Memory layout of a mode's images."""
    return torch.contiguous_format if mode == "float32" else torch.channels_last


def autocast(mode: Mode, x: Tensor) -> torch.autocast:
    """Number format of a mode."""
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=mode == "bfloat16")


def resized(images: Tensor, size: int) -> Tensor:
    """Square images (n, channels, height, width) at another size in pixels."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _loss(logits: Tensor, targets: Tensor, soft: Tensor | None, smoothing: float, weights: Tensor | None) -> Tensor:
    """Cross-entropy with the labels, and with a teacher's answers where there are any."""
    if weights is None:
        terms = [F.cross_entropy(logits, targets, label_smoothing=smoothing)]
    else:
        # Divided by the images, not by their weights: so parts and ranks add up to the whole batch's.
        total = F.cross_entropy(logits, targets, weight=weights, reduction="sum", label_smoothing=smoothing)
        terms = [total / len(targets)]
    if soft is not None:
        terms.append(F.cross_entropy(logits, soft))
    return torch.stack(terms).sum()


def _update_average(state: TrainingState) -> None:
    parameters = {name: p.detach() for name, p in state.network.named_parameters()}
    if not state.average:
        state.average = {name: p.clone() for name, p in parameters.items()}
        return
    # A short memory at first: the beginning must not weigh on a short training.
    decay = min(state.config.ema, (state.step + 1) / (state.step + 10))
    averages = [state.average[name] for name in parameters]
    torch._foreach_lerp_(averages, list(parameters.values()), 1 - decay)
