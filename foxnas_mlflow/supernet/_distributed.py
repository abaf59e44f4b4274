"""Training on several processes: torchrun starts them, this joins them and averages what they find.

PyTorch's DistributedDataParallel averages the gradients of one backward pass; a step here has one for
each of its networks, and each leaves other parameters out. So the average is computed here, by the same
idea: a gradient is sent as soon as the last network that uses its parameter has added to it, in buckets
and while the next gradients are computed.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_T = TypeVar("_T")

_BUCKET_BYTES = 2**20
"""Gradients are sent together up to this size: a message costs more than its first kilobytes."""


@dataclass(frozen=True, slots=True)
class Worker:
    """This process among those that train together.

    Attributes:
        rank: Its number; rank 0 logs, evaluates and writes.
        world_size: How many there are.
        device: Where it computes: ``cpu``, ``cuda:0``, ...
    """

    rank: int
    world_size: int
    device: str


@contextlib.contextmanager
def join_workers() -> Iterator[Worker]:
    """Join the processes that torchrun started; a process without torchrun is alone.

    Yields:
        This process. NCCL carries gradients between GPUs, gloo between processors.
    """
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = f"cuda:{local_rank}" if cuda else "cpu"
    if world_size == 1:
        yield Worker(0, 1, device)
        return
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Worker(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()


def distributed() -> bool:
    """Whether this process trains with others."""
    return dist.is_available() and dist.is_initialized()


def of_first_rank(value: _T) -> _T:
    """What rank 0 has, on all ranks."""
    if not distributed():
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values)
    chosen: _T = values[0]
    return chosen


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all ranks; the tensor itself where there is one."""
    if distributed():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def average_statistics(module: nn.Module) -> None:
    """Give all ranks the mean of their batch norms' statistics."""
    if distributed():
        buffers = list(module.buffers())
        mean = mean_over_ranks(torch.cat([buffer.flatten() for buffer in buffers]))
        _spread(mean, buffers)


def add_gradient(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Move the gradient of another module's parameter to the trained one."""
    if other.grad is not None:
        parameter.grad = other.grad if parameter.grad is None else parameter.grad.add_(other.grad)
        other.grad = None


class GradientAverage:
    """Averages a step's gradients over ranks while others are still computed.

    Args:
        network: What is trained; all ranks must train the same, and compute the same networks of it.
    """

    def __init__(self, network: nn.Module) -> None:
        self._parameters = dict(network.named_parameters())
        self._watched: set[int] = set()
        self._left: Counter[str] = Counter()
        self._buckets: list[list[str]] = []
        self._sent: list[tuple[list[Tensor], Tensor, Any]] = []

    def begin(self, networks: Sequence[Any], n_parts: int) -> None:
        """A step begins in which these modules, chosen alike on all ranks, each run backward `n_parts` times."""
        used = [network.used_parameters() for network in networks]
        self._left = Counter({name: n * n_parts for name, n in Counter(n for names in used for n in names).items()})
        self._sent = []
        last = {name: i for i, names in enumerate(used) for name in names}
        # In the order in which they will be ready: backward passes go from the last layer to the first.
        position = {name: i for i, name in enumerate(self._parameters)}
        self._buckets = [[]]
        size = 0
        for name in sorted(last, key=lambda n: (last[n], -position[n])):
            if size > _BUCKET_BYTES:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(name)
            size += self._parameters[name].nbytes
        for network in networks:
            if id(network) not in self._watched:
                self._watched.add(id(network))
                for name, parameter in network.named_parameters():
                    parameter.register_post_accumulate_grad_hook(functools.partial(self._added, name))

    def finish(self) -> None:
        """Wait for all averages and put them into the trained parameters' gradients."""
        while self._buckets:
            self._send()
        for gradients, flat, handle in self._sent:
            handle.wait()
            _spread(flat / dist.get_world_size(), gradients)

    def _added(self, name: str, parameter: nn.Parameter) -> None:
        trained = self._parameters[name]
        if parameter is not trained:
            add_gradient(trained, parameter)
        self._left[name] -= 1
        # Always in the same order, else ranks would average one bucket with another.
        while self._buckets and all(self._left[n] <= 0 for n in self._buckets[0]):
            self._send()

    def _send(self) -> None:
        parameters = [self._parameters[name] for name in self._buckets.pop(0)]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._sent.append((gradients, flat, dist.all_reduce(flat, async_op=True)))


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy consecutive entries into tensors."""
    for tensor, values in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))
