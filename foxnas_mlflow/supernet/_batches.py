"""Batches for training and their augmentation.

Everything drawn is a function of (seed, epoch, index of the batch), so a run that was resumed in
the middle of an epoch sees the batches that it would have seen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foxnas_mlflow.core.errors import import_or_raise
from foxnas_mlflow.data import ArrayImages, ImageSet
from foxnas_mlflow.data.preprocess import Normalization, resize


class Batches:
    """Augmented training batches of an image set.

    Args:
        images: The training images.
        normalization: Applied last.
        image_size: Height and width of a batch's images in pixels.
        batch_size: Images a batch on each rank; the last, smaller batch of an epoch is left out.
        flip: Mirror half of the images; wrong for digits and letters.
        seed: Seed of order and augmentation.
        workers: Processes that decode files; 0 decodes in this one.
        rank, world_size: This process among those that share every epoch.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        normalization: Normalization,
        image_size: int,
        batch_size: int,
        flip: bool = True,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        augmentation = import_or_raise("kornia.augmentation", extra="train", feature="augmentation")
        self.images, self.flip = images, flip
        self.batch_size = min(batch_size, len(images) // world_size)
        self._seed, self._workers = seed, workers
        self._rank, self._world_size = rank, world_size
        self._stored_size = image_size if isinstance(images, ArrayImages) else round(image_size * 1.15)
        channels = len(normalization.mean)
        # What a small image shows has few pixels to lose.
        least = 0.6 if image_size > 32 else 0.8
        steps = [augmentation.RandomResizedCrop((image_size, image_size), scale=(least, 1.0), ratio=(0.85, 1.18))]
        if flip:
            steps.append(augmentation.RandomHorizontalFlip())
        if channels == 3:
            steps.append(augmentation.ColorJiggle(0.2, 0.2, 0.2, 0.0))
        steps.append(augmentation.RandomErasing(p=0.1, scale=(0.02, 0.1)))
        self._augment = augmentation.AugmentationSequential(*steps, data_keys=["input"])
        self._mean = torch.tensor(normalization.mean, dtype=torch.float32).view(1, -1, 1, 1)
        self._std = torch.tensor(normalization.std, dtype=torch.float32).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.images) // (self.batch_size * self._world_size)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from index `start`: (n, c, s, s) float32 normalised, (n,) int64."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self.images))
        step = self.batch_size * self._world_size
        chosen = [order[i * step + self._rank * self.batch_size :][: self.batch_size] for i in range(start, len(self))]
        for i, (pixels, targets) in enumerate(self._read(chosen), start):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.default_rng([self._seed, epoch, i, self._rank]).integers(2**63)))
                augmented = self._augment(pixels.permute(0, 3, 1, 2).float() / 255)
            yield (augmented - self._mean) / self._std, targets

    def _read(self, chosen: list[NDArray[np.int64]]) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.images, ArrayImages):
            for index in chosen:
                yield torch.from_numpy(self.images.images[index]), torch.from_numpy(self.images.targets[index])
            return
        # Decoding dominates here, so it goes to processes; PyTorch keeps their order.
        loader = DataLoader(
            _Decoded(self.images, self._stored_size),
            batch_sampler=[index.tolist() for index in chosen],
            num_workers=self._workers,
        )
        yield from loader


class _Decoded(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: ImageSet, size: int) -> None:
        self._images, self._size = images, size

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.from_numpy(resize(self._images[i], self._size)), int(self._images.targets[i])
