"""Accuracy of subnets with inherited weights (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.random import Stream, listed_stream
from foxnas_mlflow.data import (
    Evaluation,
    ImageDataset,
    ImageSet,
    choose_by_class,
    evaluate,
    prepared_batches,
)
from foxnas_mlflow.supernet._network import PlainNetwork, Supernet, norms_of, subnet_weights
from foxnas_mlflow.supernet._threads import keep_to_processors

_BATCH = 250


def recalibrate(plain: PlainNetwork, batches: Iterable[Tensor]) -> None:
    """Compute the statistics of all batch norms anew: their mean over batches of normalised images, by images.

    The statistics of a supernet mix those of all its subnets, so a subnet needs its own. Leaves
    the network in evaluation mode.
    """
    norms = list(norms_of(plain))
    moments = [norm.momentum for norm in norms]
    plain.train()
    n_seen = 0
    with torch.no_grad():
        for batch in batches:
            n_seen += len(batch)
            for norm in norms:
                norm.momentum = len(batch) / n_seen
            plain(batch)
    for norm, momentum in zip(norms, moments, strict=True):
        norm.momentum = momentum
    plain.eval()


class SubnetEvaluator:
    """Evaluates many subnets on images that are read once per image size.

    Args:
        supernet: The trained supernet.
        dataset: Calibration images come from its training set, validation images from its
            validation set; prepared exactly as in serving.
        calibration_images: Number of images for the recalibration of batch norm.
        validation_images: Number of validation images, drawn by class; None: all.
        seed: Seed of both choices.
        device: Where to compute.
    """

    def __init__(
        self,
        supernet: Supernet,
        dataset: ImageDataset,
        *,
        calibration_images: int = 1000,
        validation_images: int | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        keep_to_processors()
        self._supernet = supernet.eval()
        self._dataset = dataset
        self._device = device
        rng = listed_stream(seed, Stream.EVALUATION_IMAGES)
        n_train, n_val = len(dataset.train), len(dataset.val)
        # Shuffled: statistics of batches of one class would not be those of the data.
        self._calibration = rng.permutation(n_train)[: min(calibration_images, n_train)]
        self._validation = np.arange(n_val)
        if validation_images is not None and validation_images < n_val:
            self._validation = choose_by_class(dataset.val.targets, validation_images, rng)
        self._cache: dict[tuple[int, bool], tuple[NDArray[np.uint8], NDArray[np.int64]]] = {}

    @property
    def n_images(self) -> int:
        """Number of validation images behind an accuracy."""
        return len(self._validation)

    def evaluate(self, architecture: Architecture) -> Evaluation:
        """Extract a subnet, recalibrate it and count its right answers."""
        return self._count(self.network(architecture), architecture.image_size)

    def accuracy(self, plain: PlainNetwork, image_size: int) -> Evaluation:
        """Recalibrate any network of these images' classes and count its right answers."""
        recalibrate(plain, self._images(image_size))
        return self._count(plain, image_size)

    def _count(self, plain: PlainNetwork, image_size: int) -> Evaluation:
        def scores(images: Tensor) -> NDArray[Any]:
            answers: NDArray[Any] = plain(images).cpu().numpy()
            return answers

        with torch.no_grad():
            (evaluation,) = evaluate(self._batches(image_size, validation=True), scores)
        return evaluation

    def network(self, architecture: Architecture) -> PlainNetwork:
        """A subnet as a plain network with its own statistics, in evaluation mode."""
        plain = self._supernet.extract(architecture).to(self._device)
        recalibrate(plain, self._images(architecture.image_size))
        return plain

    def weights(self, architecture: Architecture) -> dict[str, NDArray[Any]]:
        """Its weights by name: what quantization and the registry take."""
        return subnet_weights(self.network(architecture))

    def _images(self, size: int) -> Iterator[Tensor]:
        """Images for the statistics of batch norm."""
        return (images for images, _ in self._batches(size, validation=False))

    def _batches(self, size: int, *, validation: bool) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """Normalised images, prepared as in serving, and their targets; damaged files are left out."""
        key = (size, validation)
        if key not in self._cache:
            images: ImageSet = self._dataset.val if validation else self._dataset.train
            index = self._validation if validation else self._calibration
            # Kept as bytes: as floats they would take four times the memory.
            read = list(prepared_batches(images, self._dataset.preprocessing(size), index))
            if not read:
                raise InvalidInputError("the images must be readable", received="none is any more")
            self._cache[key] = np.concatenate([p for p, _ in read]), np.concatenate([t for _, t in read])
        pixels, targets = self._cache[key]
        # Even ones: batch norm has no variance of one image that is left over.
        for batch in np.array_split(np.arange(len(pixels)), -(-len(pixels) // _BATCH)):
            part = slice(batch[0], batch[-1] + 1)
            normalized = self._dataset.normalization(pixels[part])
            # Channels stay last in memory: up to 1.8 times as fast for colour images on a processor without AVX-512.
            x = torch.from_numpy(normalized).to(self._device).permute(0, 3, 1, 2)
            yield x, targets[part]
