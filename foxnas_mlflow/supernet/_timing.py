"""Timing a network in PyTorch: the paper's table 3 has fp32 latencies of batches on a GPU."""

from __future__ import annotations

import time

import torch

from foxnas_mlflow.core.network import Network
from foxnas_mlflow.supernet._network import PlainNetwork

MIN_RUNS = 20
"""Timed runs after which the longest time may end them."""


def time_forward(
    network: Network,
    *,
    batch: int,
    device: str,
    runs: int = 100,
    warmup_seconds: float = 1.0,
    max_seconds: float = 10.0,
) -> list[float]:
    """Milliseconds of single fp32 forward passes; random weights take the time of any.

    Args:
        network: What to time.
        batch: Images a pass.
        device: ``cpu`` or ``cuda``.
        runs: Timed passes.
        warmup_seconds: Least time of the passes before them.
        max_seconds: Time after which they end even when there are fewer than `runs` (but 20).
    """
    plain = PlainNetwork(network).eval().to(device)
    first = network.layers[0]
    images = torch.randn(batch, first.in_channels, first.in_size, first.in_size, device=device)
    cuda = images.is_cuda

    def once() -> float:
        start = time.perf_counter()
        plain(images)
        if cuda:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    with torch.inference_mode():
        begin = time.perf_counter()
        once()
        while time.perf_counter() - begin < warmup_seconds:
            once()
        begin = time.perf_counter()
        samples: list[float] = []
        while len(samples) < runs and (len(samples) < MIN_RUNS or time.perf_counter() - begin < max_seconds):
            samples.append(once())
    return samples
