"""Batches for training and how they are varied.

Everything drawn is a function of (seed, epoch, index of the batch), so a run that was resumed in
the middle of an epoch sees the batches that it would have seen.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foxnas_mlflow.core.errors import InvalidInputError, WorkerLostError
from foxnas_mlflow.data import ArrayImages, FileImages, ImageSet, Variations
from foxnas_mlflow.data.preprocess import WHITE, Normalization, Preprocessing

AUGMENTED_EPOCHS = 12
"""What is seen more often than that is varied: a network that sees its images less often learns them slower varied."""

_SMALL, _WORKERS_FROM = 32, 64


class Batches:
    """Training batches of an image set.

    Args:
        images: The training images.
        normalization: Applied last.
        image_size: Height and width of a batch's images in pixels.
        batch_size: Images a batch on each rank; the last, smaller batch of an epoch is left out.
        flip: Mirror half of the images; wrong for digits and letters.
        augment: Crop, colour and erase at random too. May be changed before an epoch begins.
        balanced: Draw every class as often as any other: an epoch has as many images as there are, those of rare
            classes again and again.
        seed: Seed of order and augmentation.
        workers: Processes that decode and vary; 0 does it in this one.
        rank, world_size: This process among those that share every epoch.
        device: Where batches are normalised, and are then.
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
        balanced: bool = False,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
    ) -> None:
        self.images, self.flip, self.augment = images, flip, augment
        self.batch_size = min(batch_size, len(images) // world_size)
        self._balanced, self._seed, self._workers = balanced, seed, workers
        self._rank, self._world_size = rank, world_size
        self._size, self._normalization = image_size, normalization
        self._device = device
        # Of a whole row of pixels: a third faster than channel by channel, to the same floats.
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device).repeat(image_size)
            for values in (normalization.mean, normalization.std)
        )

    def __len__(self) -> int:
        return len(self.images) // (self.batch_size * self._world_size)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from index `start`: (n, c, s, s) float32 normalised, (n,) int64.

        Raises:
            InvalidInputError: If no image of a batch can be read any more.
        """
        rng = np.random.default_rng([self._seed, epoch])
        order = balanced_order(self.images.targets, rng) if self._balanced else rng.permutation(len(self.images))
        step = self.batch_size * self._world_size
        chosen = [
            _Chosen(
                order[i * step + self._rank * self.batch_size :][: self.batch_size], (self._seed, epoch, i, self._rank)
            )
            for i in range(start, len(self))
        ]
        for pixels, targets, skipped in self._read(chosen):
            if skipped and isinstance(self.images, FileImages):
                self.images.say_broken(skipped)
            if not len(targets):
                raise InvalidInputError(
                    "the images of a batch must be readable",
                    received=f"none of {len(skipped)}",
                    remedy="look whether they are where they were, and run the same command again (foxnas supernet: "
                    "with --resume): it continues",
                )
            if len(targets) == 1:  # Batch norm has no variance of one image.
                pixels, targets = pixels.repeat(2, 1, 1, 1), targets.repeat(2)
            yield self._normalized(pixels), targets

    def _read(self, chosen: Sequence[_Chosen]) -> Iterable[_Read]:
        """Bytes of each batch, varied."""
        source = _Source(self.images, self._size, self._normalization, self.augment, self.flip)
        # Small images in memory are cropped sooner than a process starts.
        alone = isinstance(self.images, ArrayImages) and self._size < _WORKERS_FROM
        if alone or not self._workers:
            return map(source.__getitem__, chosen)
        loader: DataLoader[Any] = DataLoader(
            source,
            batch_size=None,
            sampler=chosen,
            num_workers=self._workers,
            pin_memory=self._device != "cpu",
            generator=torch.Generator(),
        )
        return _read_elsewhere(loader)

    def _normalized(self, pixels: Tensor) -> Tensor:
        """Bytes (n, s, s, c) as normalised floats (n, c, s, s), on the device."""
        rows = pixels.to(self._device, non_blocking=True).flatten(2).float()
        return rows.div_(255).sub_(self._mean).div_(self._std).view(pixels.shape).permute(0, 3, 1, 2)


def _read_elsewhere(loader: DataLoader[Any]) -> Iterator[_Read]:
    """Batches from processes; one that ends is told between two batches.

    PyTorch's handler of SIGCHLD raises wherever the training happens to be: in the middle of a step, whose weights
    would be half updated. Without it the loader finds out where it waits for a batch, after five seconds.
    """
    handled = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if handled:
        signal.signal(signal.SIGCHLD, before)
    try:
        yield from batches
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A batch that a process had made before it ended cannot be fetched from it any more.
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise WorkerLostError(
            "the processes that read images must go on to the end",
            received=str(error),
            remedy="look for what ended them (the system ends processes where memory runs out, see dmesg), and run the "
            "same command again (foxnas supernet: with --resume): it continues",
        ) from error


def balanced_order(targets: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """As many indices as there are images, each class as often as any other to one, its images in turn."""
    classes = rng.permutation(np.unique(targets))
    shares = np.diff(np.arange(len(classes) + 1) * len(targets) // len(classes))
    chosen = []
    for label, share in zip(classes, shares, strict=True):
        members = np.flatnonzero(targets == label)
        turns = [rng.permutation(members) for _ in range(-(-int(share) // len(members)))]
        chosen.append(np.concatenate(turns)[:share])
    return rng.permutation(np.concatenate(chosen))


class _Chosen(NamedTuple):
    """A batch to read: indices of its images, and what its crops are drawn from."""

    images: NDArray[np.int64]
    seed: tuple[int, ...]


_Read = tuple[Tensor, Tensor, list[int]]
"""Bytes (n, s, s, c), class indices (n,), and indices of images that cannot be read any more."""


class _Source(Dataset[_Read]):
    """Whole batches as bytes."""

    def __init__(self, images: ImageSet, size: int, normalization: Normalization, augment: bool, flip: bool) -> None:
        self._images, self._size, self._augment, self._flip = images, size, augment, flip
        # Where nothing is cropped at random the pixels are those of serving.
        background = images.background if isinstance(images, FileImages) else WHITE
        self._preprocessing = Preprocessing(
            size, len(normalization.mean), normalization=normalization, background=background
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, chosen: _Chosen) -> _Read:
        index, size = chosen.images, self._size
        # What a small image shows has few pixels to lose.
        least = 0.6 if size > _SMALL else 0.8
        varied = Variations.drawn(len(index), np.random.default_rng(chosen.seed), least=least, mirror=self._flip)
        pixels = np.empty((len(index), size, size, self._preprocessing.channels), np.uint8)
        kept: list[int] = []
        skipped: list[int] = []
        for k, i in enumerate(map(int, index)):
            try:
                if self._augment:
                    pixels[len(kept)] = varied.applied(k, self._images.to_vary(i, size), size)
                else:
                    image = self._images.prepared(i, self._preprocessing)
                    pixels[len(kept)] = image[:, ::-1] if varied.mirrored[k] else image
            except (InvalidInputError, OSError):
                skipped.append(i)
                continue
            kept.append(i)
        return torch.from_numpy(pixels[: len(kept)]), torch.from_numpy(self._images.targets[kept]), skipped
