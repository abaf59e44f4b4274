"""Training on several processes: torchrun starts them, this joins them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


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
