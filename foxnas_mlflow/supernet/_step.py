"""One update of the supernet: its subnets, their gradients, and the fastest way to compute them."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor, nn

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.supernet._network import PlainNetwork, Supernet
from foxnas_mlflow.supernet._state import Mode, TrainConfig, TrainingState

_T = TypeVar("_T")

# The largest network teaches the others: what it learns sooner, all do. Theirs are two terms, labels and its
# answers, so that it would have the least of the gradient otherwise.
_LARGEST_WEIGHT = 4.0
"""Weight of the largest network's loss in a sandwich, where the others have 1 for each of their two terms."""

_FAR = 3.0
"""A number format that takes as many times the fastest's with few images is not timed with a whole batch."""

_FEW = 8
"""Images for that."""


class Workers:
    """Threads that share the processor and compute one subnet of a step each.

    PyTorch divides every operator among all threads. On small images most operators are too small
    for that: one thread for each of two subnets is faster than two threads for both.

    Args:
        supernet: The supernet that is trained, on its device.
        n: Number of workers; 1 computes one subnet after another with all threads.
    """

    def __init__(self, supernet: Supernet, n: int) -> None:
        self._supernets = [supernet]
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

    def supernets(self, n: int) -> list[Supernet]:
        """One for each of n subnets, the trained one and aliases of it.

        Threads with parameters in common would wait for each other for ever: PyTorch locks a parameter
        to join it to a graph, and takes Python's lock in there.
        """
        while len(self._supernets) < n:
            self._supernets.append(self._supernets[0].alias())
        return self._supernets[:n]

    def run(self, function: Callable[[int], None], n: int, awaited: Future[Tensor]) -> None:
        """Call a function with 0 to n - 1.

        Args:
            function: What to call.
            n: How often.
            awaited: A value that the first call sets and the others may wait for.
        """
        if self._pool is None:
            for i in range(n):
                function(i)
            return
        tasks = [self._pool.submit(function, i) for i in range(n)]
        # Nobody waits for a value that a failed call did not set.
        tasks[0].add_done_callback(lambda _: awaited.cancel())
        for task in tasks:
            task.result()


def set_gradients(
    state: TrainingState,
    images: Tensor,
    targets: Tensor,
    phase: int,
    teacher: PlainNetwork | None,
    workers: Workers,
) -> Tensor:
    """Compute a step's subnets; their mean loss, its gradient left in the supernet's parameters.

    Running statistics are those of the first subnet, the largest in a sandwich.
    """
    config = state.config
    subnets = draw_subnets(config, state.supernet.space, phase, np.random.default_rng([config.seed, 3, state.step]))
    supernets = workers.supernets(len(subnets))
    losses: list[Tensor] = [torch.zeros(())] * len(subnets)
    answers: Future[Tensor] = Future()

    def compute(i: int) -> None:
        supernet, x = supernets[i], _resized(images, subnets[i].image_size)
        supernet.zero_grad(set_to_none=True)
        supernet.set_subnet(subnets[i])
        soft: Tensor | None = None
        with autocast(config.mode, x):
            if teacher is not None:
                with torch.no_grad():
                    soft = F.softmax(teacher(x).float(), 1)
            logits = supernet(x).float()
        if config.strategy == "sandwich":
            if i:
                soft = answers.result()
            else:
                answers.set_result(F.softmax(logits.detach(), 1))
        terms = [F.cross_entropy(logits, targets, label_smoothing=config.label_smoothing)]
        if soft is not None:
            terms.append(F.cross_entropy(logits, soft))
        loss = torch.stack(terms).sum() / len(subnets)
        if config.strategy == "sandwich" and not i:
            loss = _LARGEST_WEIGHT * loss
        loss.backward()  # type: ignore[no-untyped-call]
        losses[i] = loss.detach()

    workers.run(compute, len(subnets), answers)
    for parameter, *others in zip(*(supernet.parameters() for supernet in supernets), strict=True):
        # In one order, so that a resumed training comes to the same sums.
        for other in others:
            if other.grad is not None:
                parameter.grad = other.grad if parameter.grad is None else parameter.grad.add_(other.grad)
    return torch.stack(losses).sum()


def update(state: TrainingState, loss: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """Change the weights by the gradients that `set_gradients` left.

    Args:
        state: What is trained.
        loss: The step's mean loss.
        optimizer: Of the supernet's parameters.

    Returns:
        The loss; NaN if it or the gradient is not finite, and nothing is updated then: the next
        checkpoint saves these weights.
    """
    parameters = [p for p in state.supernet.parameters() if p.grad is not None]
    if distributed():
        _average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, state.config.clip_norm, foreach=True)
    # One transfer from the device a step.
    total, length = torch.stack([loss, norm]).tolist()
    if math.isfinite(total) and math.isfinite(length):
        optimizer.step()
        if state.config.ema:
            _update_average(state)
        return float(total)
    return math.nan


def draw_subnets(config: TrainConfig, space: SearchSpace, phase: int, rng: np.random.Generator) -> list[Architecture]:
    """The subnets of a step; the first of a sandwich teaches the others."""
    if config.strategy == "sandwich":
        drawn = space.sample(rng, n=config.n_random)
        # Half of the time at any size: else small kernels would learn small images only, and large ones large images.
        any_size = [int(size) for size in rng.choice(space.image_sizes, 2)]
        largest, smallest = (None if rng.random() < 0.5 else size for size in any_size)
        return [space.largest(largest), *drawn, space.smallest(smallest)]
    open_kernels, open_depths, open_expansions = phase >= 1, phase >= 2, phase >= 3
    limited = space.replace(
        kernels=space.kernels if open_kernels else space.kernels[-1:],
        depths=space.depths if open_depths else space.depths[-1:],
        expansions=space.expansions if open_expansions else space.expansions[-1:],
    )
    return list(limited.sample(rng, n=1))


def layout(mode: Mode) -> torch.memory_format:
    """Memory layout of a mode's images."""
    return torch.contiguous_format if mode == "float32" else torch.channels_last


def autocast(mode: Mode, x: Tensor) -> torch.autocast:
    """Number format of a mode."""
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=mode == "bfloat16")


def fastest_mode(supernet: Supernet, images: Tensor, targets: Tensor, device: str) -> Mode:
    """Time forward and backward of the largest network in each mode; another must win by 5 %."""
    supernet.set_subnet(supernet.space.largest())
    y = targets.to(device)

    def run(n_images: int, mode: Mode) -> None:
        x = images[:n_images].to(device, memory_format=layout(mode))
        with autocast(mode, x):
            loss = F.cross_entropy(supernet(x).float(), y[:n_images])
        loss.backward()  # type: ignore[no-untyped-call]
        if x.is_cuda:
            torch.cuda.synchronize()

    modes: tuple[Mode, ...] = ("float32", "channels_last", "bfloat16")
    with _no_trace(supernet):
        # Where bfloat16 is emulated it takes 18 times as long.
        likely = _likely(functools.partial(run, _FEW), modes, rounds=2)
        return _fastest(functools.partial(run, len(images)), likely, rounds=4)


def fastest_workers(state: TrainingState, images: Tensor, targets: Tensor, teacher: PlainNetwork | None) -> int:
    """Time a step's gradients with one subnet after another and with subnets side by side."""
    n_subnets = len(draw_subnets(state.config, state.supernet.space, 0, np.random.default_rng(0)))
    n = min(torch.get_num_threads(), n_subnets)
    if n == 1 or images.is_cuda:
        return 1

    # One pool for all rounds: new threads would begin each time with nothing prepared.
    with _no_trace(state.supernet), Workers(state.supernet, 1) as one, Workers(state.supernet, n) as many:
        workers = {1: one, n: many}

        def run(n_workers: int) -> None:
            set_gradients(state, images, targets, 0, teacher, workers[n_workers])

        return _fastest(run, (1, n), rounds=4)


@contextlib.contextmanager
def _no_trace(supernet: Supernet) -> Iterator[None]:
    """Leave gradients and statistics as they are."""
    statistics = {name: t.clone() for name, t in supernet.named_buffers()}
    yield
    supernet.zero_grad(set_to_none=True)
    for name, buffer in supernet.named_buffers():
        buffer.copy_(statistics[name])


def _fastest(run: Callable[[_T], None], choices: Sequence[_T], *, rounds: int) -> _T:
    """The choice with the least median time; one after the first must win by 5 %."""
    medians = _seconds(run, choices, rounds)
    best = int(np.argmin(medians))
    return choices[best if medians[best] < 0.95 * medians[0] else 0]


def _likely(run: Callable[[_T], None], choices: Sequence[_T], *, rounds: int) -> list[_T]:
    """The choices that are not far slower than the fastest."""
    medians = _seconds(run, choices, rounds)
    return [choice for choice, taken in zip(choices, medians, strict=True) if taken < _FAR * min(medians)]


def _seconds(run: Callable[[_T], None], choices: Sequence[_T], rounds: int) -> list[float]:
    """Median times; the first round warms up and is not counted."""
    times: list[list[float]] = [[] for _ in choices]
    # In turns, so that a slow moment of the machine meets all of them.
    for _ in range(rounds):
        for choice, taken in zip(choices, times, strict=True):
            start = time.perf_counter()
            run(choice)
            taken.append(time.perf_counter() - start)
    return [float(np.median(taken[1:])) for taken in times]


def distributed() -> bool:
    """Whether this process trains with others."""
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


def _update_average(state: TrainingState) -> None:
    parameters = {name: p.detach() for name, p in state.supernet.named_parameters()}
    if not state.average:
        state.average = {name: p.clone() for name, p in parameters.items()}
        return
    # A short memory at first: the beginning must not weigh on a short training.
    decay = min(state.config.ema, (state.step + 1) / (state.step + 10))
    averages = [state.average[name] for name in parameters]
    torch._foreach_lerp_(averages, list(parameters.values()), 1 - decay)


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
