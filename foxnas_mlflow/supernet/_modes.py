"""The fastest way to compute a step on this machine: number format, memory layout, networks side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor

from foxnas_mlflow.supernet._distributed import distributed, of_first_rank
from foxnas_mlflow.supernet._state import Mode, TrainConfig, TrainingState
from foxnas_mlflow.supernet._step import Teacher, Workers, autocast, layout, set_gradients
from foxnas_mlflow.supernet._strategy import TrainedNetwork, strategy_of

_T = TypeVar("_T")

_SHORT = 100
"""A training of fewer steps is done before it could gain what the timing takes, that of about ten steps."""

_FAR = 3.0
"""A number format that takes as many times the fastest's with few images is not timed with a whole batch."""

_FEW = 8
"""Images for that."""


def resolved(
    state: TrainingState, n_steps: int, batch: Callable[[], tuple[Tensor, Tensor]], teacher: Teacher | None, device: str
) -> TrainConfig:
    """The configuration with what it leaves open measured, ``mode`` and ``workers``, where the training is long enough.

    Args:
        state: What is trained, on the device.
        n_steps: Steps of the whole training.
        batch: Gives a batch to measure with.
        teacher: Of the present phase.
        device: Where to compute.
    """
    config = state.config
    if distributed():
        # A gradient is averaged while others are computed, in one order on all ranks.
        config = dataclasses.replace(config, workers=1)
    if n_steps < _SHORT:
        return dataclasses.replace(
            config, mode="float32" if config.mode == "auto" else config.mode, workers=config.workers or 1
        )
    if config.mode != "auto" and config.workers:
        return config
    images, targets = batch()
    if config.mode == "auto":
        mode = of_first_rank(fastest_mode(state.network, images, targets, device))
        config = dataclasses.replace(config, mode=mode)
    if not config.workers:
        x = images.to(device, memory_format=layout(config.mode))
        measured = dataclasses.replace(state, config=config)
        config = dataclasses.replace(config, workers=fastest_workers(measured, x, targets.to(device), teacher))
    return config


def fastest_mode(network: TrainedNetwork, images: Tensor, targets: Tensor, device: str) -> Mode:
    """Time forward and backward of the chosen network in each mode; another must win by 5 %."""
    y = targets.to(device)

    def run(n_images: int, mode: Mode) -> None:
        x = images[:n_images].to(device, memory_format=layout(mode))
        with autocast(mode, x):
            loss = F.cross_entropy(network(x).float(), y[:n_images])
        loss.backward()  # type: ignore[no-untyped-call]
        if x.is_cuda:
            torch.cuda.synchronize()

    modes: tuple[Mode, ...] = ("float32", "channels_last", "bfloat16")
    with _no_trace(network):
        # Where bfloat16 is emulated it takes 18 times as long.
        likely = _likely(functools.partial(run, _FEW), modes, rounds=2)
        return _fastest(functools.partial(run, len(images)), likely, rounds=4)


def fastest_workers(state: TrainingState, images: Tensor, targets: Tensor, teacher: Teacher | None) -> int:
    """Time a step's gradients with one subnet after another and with subnets side by side."""
    asked = 1

    def count(n: int) -> list[Any]:
        nonlocal asked
        asked = n
        return [state.network] * n

    strategy_of(state.config).prepare(state.network, count, 0, np.random.default_rng(0))
    n = min(torch.get_num_threads(), asked)
    if n == 1 or images.is_cuda:
        return 1

    # One pool for all rounds: new threads would begin each time with nothing prepared.
    with _no_trace(state.network), Workers(state.network, 1) as one, Workers(state.network, n) as many:
        workers = {1: one, n: many}

        def run(n_workers: int) -> None:
            set_gradients(state, images, targets, workers[n_workers], teacher=teacher)

        return _fastest(run, (1, n), rounds=4)


@contextlib.contextmanager
def _no_trace(network: TrainedNetwork) -> Iterator[None]:
    """Leave gradients and statistics as they are."""
    statistics = {name: t.clone() for name, t in network.named_buffers()}
    yield
    network.zero_grad(set_to_none=True)
    for name, buffer in network.named_buffers():
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
