"""Batches for training and how they are varied.

Everything drawn is a function of (seed, epoch, index of the batch), so a run that was resumed in
the middle of an epoch sees the batches that it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foxnas_mlflow.core.errors import InvalidInputError, import_or_raise
from foxnas_mlflow.data import ArrayImages, ImageSet
from foxnas_mlflow.data.preprocess import Normalization, Preprocessing

AUGMENTED_EPOCHS = 12
"""What is seen more often than that is varied: a network that sees its images less often learns them slower varied."""


class Batches:
    """Training batches of an image set.

    Args:
        images: The training images.
        normalization: Applied last.
        image_size: Height and width of a batch's images in pixels.
        batch_size: Images a batch on each rank; the last, smaller batch of an epoch is left out.
        flip: Mirror half of the images; wrong for digits and letters.
        augment: Crop, colour and erase at random too. May be changed before an epoch begins.
        seed: Seed of order and augmentation.
        workers: Processes that decode files; 0 decodes in this one.
        rank, world_size: This process among those that share every epoch.

    Attributes:
        skipped: Indices of images whose files could not be read any more when their turn came.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        normalization: Normalization,
        image_size: int,
        batch_size: int,
        flip: bool = True,
        augment: bool = True,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._augmentation = import_or_raise("kornia.augmentation", extra="train", feature="augmentation")
        self.images, self.flip, self.augment = images, flip, augment
        self.batch_size = min(batch_size, len(images) // world_size)
        self.skipped: set[int] = set()
        self._seed, self._workers = seed, workers
        self._rank, self._world_size = rank, world_size
        self._size, self._normalization = image_size, normalization
        self._mean = torch.tensor(normalization.mean, dtype=torch.float32).view(1, -1, 1, 1)
        self._std = torch.tensor(normalization.std, dtype=torch.float32).view(1, -1, 1, 1)

    def __len__(self) -> int:
        return len(self.images) // (self.batch_size * self._world_size)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from index `start`: (n, c, s, s) float32 normalised, (n,) int64."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self.images))
        step = self.batch_size * self._world_size
        varied = self._variation()
        chosen = [order[i * step + self._rank * self.batch_size :][: self.batch_size] for i in range(start, len(self))]
        for i, (pixels, targets) in enumerate(self._read(chosen), start):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.default_rng([self._seed, epoch, i, self._rank]).integers(2**63)))
                x = varied(pixels.permute(0, 3, 1, 2).float() / 255)
            yield (x - self._mean) / self._std, targets

    def _variation(self) -> Callable[[Tensor], Tensor]:
        """What changes a batch of values in 0..1 at random."""
        kornia, size, steps = self._augmentation, self._size, []
        if self.augment:
            # What a small image shows has few pixels to lose.
            least = 0.6 if size > 32 else 0.8
            steps.append(kornia.RandomResizedCrop((size, size), scale=(least, 1.0), ratio=(0.85, 1.18)))
        if self.flip:
            steps.append(kornia.RandomHorizontalFlip())
        if self.augment:
            steps += [kornia.ColorJiggle(0.2, 0.2, 0.2, 0.0)] if self._mean.numel() == 3 else []
            steps.append(kornia.RandomErasing(p=0.1, scale=(0.02, 0.1)))
        if not steps:
            return lambda x: x
        varied: Callable[[Tensor], Tensor] = kornia.AugmentationSequential(*steps, data_keys=["input"])
        return varied

    def _read(self, chosen: list[NDArray[np.int64]]) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.images, ArrayImages) and (
            self.augment or self.images.images.shape[1:3] == (self._size,) * 2
        ):
            # At their size already, or cropped to it at random.
            for index in chosen:
                yield torch.from_numpy(self.images.images[index]), torch.from_numpy(self.images.targets[index])
            return
        # The pixels of serving, which are kept, before something is varied.
        preprocessing = Preprocessing(self._size, len(self._normalization.mean), normalization=self._normalization)
        # Decoding dominates here, so it goes to processes; PyTorch keeps their order.
        loader: DataLoader[Any] = DataLoader(
            _Decoded(self.images, preprocessing), batch_size=None, sampler=chosen, num_workers=self._workers
        )
        for pixels, targets, skipped in loader:
            self.skipped.update(map(int, skipped))
            if len(targets) > 1:  # Batch norm has no variance of one image.
                yield pixels, targets


class _Decoded(Dataset[tuple[Tensor, Tensor, list[int]]]):
    """Whole batches by their images' indices, and those of images that cannot be read any more."""

    def __init__(self, images: ImageSet, preprocessing: Preprocessing) -> None:
        self._images, self._preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: NDArray[np.int64]) -> tuple[Tensor, Tensor, list[int]]:
        pixels, kept, skipped = [], [], []
        for i in map(int, index):
            try:
                pixels.append(self._images.prepared(i, self._preprocessing))
            except (InvalidInputError, OSError):
                skipped.append(i)
                continue
            kept.append(i)
        size = self._preprocessing.image_size
        stacked = np.stack(pixels) if pixels else np.empty((0, size, size, 1), np.uint8)
        return torch.from_numpy(stacked), torch.from_numpy(self._images.targets[kept]), skipped
