"""A teacher from outside: any model that gives probabilities for images, made to answer a training's batches."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from numpy.typing import NDArray
from torch import Tensor

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.data import Normalization
from foxnas_mlflow.supernet._network import PlainNetwork
from foxnas_mlflow.supernet._step import Teacher, resized

Answer = Callable[[NDArray[np.uint8]], NDArray[np.float64]]
"""Probabilities (n, n_classes) for images (n, height, width, channels)."""

_SUM_TOLERANCE = 0.02


def network_teacher(plain: PlainNetwork, *, its: Normalization, ours: Normalization) -> Teacher:
    """A network that was trained elsewhere, perhaps on images of another mean, as a teacher.

    It computes where the batches are that it is shown.

    Args:
        plain: The network, with our classes.
        its, ours: Normalisation of its images and of the batches that it is shown.
    """
    plain.eval()
    scale, offset = _between(ours, its)

    @functools.lru_cache(maxsize=1)
    def placed(device: torch.device) -> tuple[PlainNetwork, Tensor, Tensor]:
        return plain.to(device), scale.to(device), offset.to(device)

    def answer(images: Tensor) -> Tensor:
        network, times, plus = placed(images.device)
        with torch.no_grad():
            return F.softmax(network(resized(images * times + plus, plain.image_size)).float(), 1)

    return answer


def function_teacher(answer: Answer, *, ours: Normalization, image_size: int | None, n_classes: int) -> Teacher:
    """A function on plain images as a teacher.

    Args:
        answer: The function.
        ours: Normalisation of the batches that it is shown.
        image_size: Size of the images that it takes; None: any.
        n_classes: Number of our classes.

    Returns:
        A teacher that raises InvalidInputError at answers that are no probabilities of our classes.
    """
    mean, std = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (ours.mean, ours.std))

    def answers(images: Tensor) -> Tensor:
        pixels = images.detach().float().cpu() * std + mean
        pixels = resized(pixels, image_size or images.shape[-1]).clamp(0, 1)
        shown = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        given = np.asarray(answer(shown), np.float64)
        if given.shape != (len(images), n_classes):
            raise InvalidInputError(
                f"a teacher must give one probability for each of the {n_classes} classes of the images",
                received=f"an answer of shape {given.shape} for {len(images)} images",
            )
        sums = given.sum(axis=1)
        if not np.isfinite(given).all() or given.min() < 0 or np.abs(sums - 1).max() > _SUM_TOLERANCE:
            raise InvalidInputError(
                "a teacher must give probabilities, which are 0 or more and add up to 1",
                received=f"values from {given.min():g} to {given.max():g}",
                remedy="end the model with a softmax",
            )
        return torch.from_numpy((given / sums[:, None]).astype(np.float32)).to(images.device)

    return answers


def _between(ours: Normalization, its: Normalization) -> tuple[Tensor, Tensor]:
    """Factor and summand, each (1, channels, 1, 1), from our normalised values to its."""
    mean, std, to_mean, to_std = (np.asarray(v, np.float64) for v in (ours.mean, ours.std, its.mean, its.std))
    parts = std / to_std, (mean - to_mean) / to_std
    scale, offset = (torch.tensor(part, dtype=torch.float32).view(1, -1, 1, 1) for part in parts)
    return scale, offset
