"""How many threads PyTorch computes with."""

from __future__ import annotations

import os

import torch

from foxnas_mlflow.core.processors import n_processors


def keep_to_processors() -> None:
    """Let PyTorch compute with no more threads than this process has processors.

    It counts those of the machine, or those that the process may use, and knows no quota of a container, which holds
    back in every period what goes beyond. Who sets OMP_NUM_THREADS has said how many.
    """
    n = n_processors()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > n:
        torch.set_num_threads(n)
