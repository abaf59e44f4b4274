"""Labelled images: what training, evaluation and quantization read.

| source            | what                                                                         |
|-------------------|------------------------------------------------------------------------------|
| ``digits``        | scikit-learn's 1,797 handwritten digits, 8 x 8 grey, embedded                 |
| ``glyphs``        | 3,960 drawn letters of 18 classes, 32 x 32 in colour: see `_glyphs`           |
| ``fashion-mnist`` | 70,000 pictures of clothes, 28 x 28 grey, from Debian's dataset-fashion-mnist |
| a folder          | IDX files; one folder a class; or ``train`` and ``val`` (and ``test``) with   |
|                   | one folder a class each, under any usual name                                 |
| a list            | CSV or JSON Lines with ``file``, ``label``, perhaps ``split`` and ``group``   |
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import logging
import os
import re
import shlex
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidInputError, import_or_raise
from foxnas_mlflow.core.random import Stream, listed_stream
from foxnas_mlflow.data._cache import Pixels, look_through
from foxnas_mlflow.data._duplicates import duplicate_warnings, listed
from foxnas_mlflow.data._glyphs import LETTERS, glyphs
from foxnas_mlflow.data._listings import ListedPart, Listing, keep_listing, open_listing
from foxnas_mlflow.data._look import FACTS, LOOKS, STATISTICS_SIDE
from foxnas_mlflow.data._names import Names, Paths
from foxnas_mlflow.data._sources import (
    LIST_SUFFIXES,
    UNREADABLE,
    Pictures,
    find_parts,
    find_root,
    is_idx,
    is_junk,
    open_unpacked,
    pictures_of,
    pictures_of_list,
    reader_for,
    subfolders,
    unread_words,
    validated_on,
)
from foxnas_mlflow.data.preprocess import (
    MAX_PIXELS,
    WHITE,
    Normalization,
    Preprocessing,
    decode_image,
    decode_picture,
    is_too_large,
)

ImageArray = NDArray[np.uint8]

logger = logging.getLogger("foxnas_mlflow")

MAX_UNREADABLE = 0.05
"""Share of a folder's images that may be unreadable; they are left out and named."""

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_STATISTICS_IMAGES = 2000
FEW_IMAGES, IMBALANCE = 10, 10
"""A class with fewer training images, and a ratio between classes, that a user is warned of."""


class ImageSet(Protocol):
    """Images with their classes."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """Index of the class of each image, shape (n,)."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, i: int) -> ImageArray:
        """Image i as uint8 (height, width, channels)."""

    def prepared(self, i: int, preprocessing: Preprocessing) -> ImageArray:
        """Image i as a served model gets it, before normalisation: uint8 (image_size, image_size, channels)."""

    def to_vary(self, i: int, size: int) -> Any:
        """Image i as a Pillow image of mode RGB or L that crops of `size` px can be cut from."""


def _picture(image: ImageArray) -> Any:
    pillow = import_or_raise("PIL.Image", extra="train", feature="varying images")
    return pillow.fromarray(image if image.shape[-1] == 3 else image[..., 0])


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in memory.

    Attributes:
        images: uint8 (n, height, width, channels).
        targets: Class indices (n,).
    """

    images: ImageArray
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> ImageArray:
        image: ImageArray = self.images[i]
        return image

    def prepared(self, i: int, preprocessing: Preprocessing) -> ImageArray:
        """Image i scaled and cut to uint8 (image_size, image_size, channels)."""
        return preprocessing.resize(self.images[i])

    def to_vary(self, i: int, size: int) -> Any:
        """Image i as it is, as a Pillow image."""
        return _picture(self.images[i])


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images in files, decoded when they are asked for at a size that is not kept.

    Attributes:
        paths: One file an image.
        targets: Class indices (n,).
        facts: What is known of each name of the paths: `FACTS` while it is loaded, then `LOOKS`.
        pixels: Decoded pixels by size, where they are kept.
        groups: Group of each name of the paths, which a split keeps together; None: each is its own.
        broken: Files that could not be read any more when they were asked for, of all parts of the data set.
        channels: 3 for colour, 1 for grey.
        max_pixels: Largest width x height that is decoded.
        background: Grey level behind transparent parts; on another than white no pixels are kept.
    """

    paths: Paths
    targets: NDArray[np.int64]
    facts: NDArray[Any]
    pixels: Mapping[int, Pixels] = field(default_factory=dict)
    groups: NDArray[np.int64] | None = None
    broken: set[str] = field(default_factory=set)
    channels: int = 3
    max_pixels: int = MAX_PIXELS
    background: int = WHITE

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> ImageArray:
        return decode_image(
            self.paths[i].read_bytes(),
            channels=self.channels,
            max_pixels=self.max_pixels,
            background=self.background,
        )

    def prepared(self, i: int, preprocessing: Preprocessing) -> ImageArray:
        """Image i as serving decodes its file: uint8 (image_size, image_size, channels)."""
        usual = (preprocessing.crop, preprocessing.background, preprocessing.channels) == (1.0, WHITE, self.channels)
        if usual and (kept := self._kept(i, preprocessing.image_size)) is not None:
            return np.array(kept)
        return preprocessing.decode(self.paths[i].read_bytes(), max_pixels=self.max_pixels)

    def to_vary(self, i: int, size: int) -> Any:
        """The pixels that are kept of image i at this size; all of it, a large photo's at a reduced size, otherwise."""
        if self.background == WHITE and (kept := self._kept(i, size)) is not None:
            return _picture(kept)
        return decode_picture(
            self.paths[i].read_bytes(),
            channels=self.channels,
            max_pixels=self.max_pixels,
            shorter=size,
            background=self.background,
        )

    def _kept(self, i: int, size: int) -> ImageArray | None:
        kept = self.pixels.get(size)
        row = -1 if kept is None else int(kept.rows[self.paths.rows[i]])
        return None if kept is None or row < 0 else kept.array[row]

    def say_broken(self, index: Iterable[int]) -> None:
        """Name those of these images that were not named before."""
        new = sorted({str(self.paths[i]) for i in index} - self.broken)
        self.broken.update(new)
        if new:
            logger.warning("%d pictures cannot be read any more and are skipped: %s", len(new), ", ".join(new[:5]))

    def unbroken(self) -> FileImages:
        """Those that are not known to be broken."""
        if not self.broken:
            return self
        return self.take(np.flatnonzero([str(path) not in self.broken for path in self.paths]))

    def take(self, index: NDArray[np.int64]) -> FileImages:
        """Some of the images, in this order."""
        return dataclasses.replace(self, paths=self.paths.take(index), targets=self.targets[index])


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set for classification.

    Attributes:
        source: What the user named.
        labels: Class names in the order of the class indices.
        train: Images to train on.
        val: Images to validate on; never trained on.
        channels: 3 for colour, 1 for grey.
        normalization: Mean and std of the training images.
        digest: SHA-256 of the pixels, or of the names and contents of the files.
        unreadable: Files that could not be read and were left out.
        test: Images held out from both, where the source has such a part.
        unread: How many files of each suffix are no pictures that are read here.
        notes: What else a user should know of it.
        drawn_split: Whether the validation images are drawn from the source's by a seed.
        background: Grey level behind transparent parts of pictures.
        earlier_digest: What releases before called these images, by names and sizes alone; empty: as now.
    """

    source: str
    labels: tuple[str, ...]
    train: ImageSet
    val: ImageSet
    channels: int
    normalization: Normalization
    digest: str
    unreadable: tuple[str, ...] = ()
    test: ImageSet | None = None
    unread: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    drawn_split: bool = False
    background: int = WHITE
    earlier_digest: str = ""

    @property
    def drawn(self) -> bool:
        """Whether the images are drawn with all the variation that they should have: neither mirrored nor varied."""
        return self.source == "glyphs"

    @property
    def may_mirror(self) -> bool:
        """Whether mirrored images are taken to show the same: pictures in colour, but no letters that are drawn."""
        return self.channels == 3 and not self.drawn

    @property
    def broken(self) -> tuple[str, ...]:
        """Files that were whole at first, and could not be read any more when they were asked for."""
        sets = (images.broken for images in (self.train, self.val) if isinstance(images, FileImages))
        return tuple(sorted(set().union(*sets)))

    def warnings(self) -> list[str]:
        """What a user should know of the data before training, each with its numbers."""
        counts = np.bincount(self.train.targets, minlength=self.n_classes)
        few = [f"{self.labels[i]} ({counts[i]})" for i in np.flatnonzero(counts < FEW_IMAGES)]
        missing = [self.labels[i] for i in sorted(set(range(self.n_classes)) - set(self.val.targets.tolist()))]
        alike: dict[str, list[str]] = {}
        for label in self.labels:
            alike.setdefault(label.strip().casefold(), []).append(label)
        found = [
            f"classes whose names differ by case or spaces alone: {', '.join(map(repr, names))}"
            for names in alike.values()
            if len(names) > 1
        ]
        if counts.max() >= IMBALANCE * counts.min():
            most, least = self.labels[int(counts.argmax())], self.labels[int(counts.argmin())]
            found.append(f"classes are unbalanced: {counts.max()} training images of {most}, {counts.min()} of {least}")
        if few:
            found.append(f"classes with fewer than {FEW_IMAGES} training images: {', '.join(few)}")
        if missing:
            found.append(f"classes without validation images: {', '.join(missing)}")
        if self.unread:
            found.append(f"files that are not read: {unread_words(self.unread)}")
        large: list[str] = []
        damaged: list[str] = []
        for name in self.unreadable:
            (large if _left_out_for_size(name) else damaged).append(name)
        if large:
            what = f"{len(large)} pictures of more than {MAX_PIXELS // 10**6} million pixels are left out"
            found.append(f"{what}, scale them down: {', '.join(large[:5])}")
        if damaged:
            found.append(f"{len(damaged)} damaged files are left out: {', '.join(damaged[:5])}")
        return found + list(self.notes) + self._duplicates()

    def _duplicates(self) -> list[str]:
        named = {"training": self.train, "validation": self.val, "test": self.test}
        files = {part: images.unbroken() for part, images in named.items() if isinstance(images, FileImages)}
        files = {part: images for part, images in files.items() if len(images)}
        if not files:
            return []
        parts = {part: (images.paths, images.targets, images.facts) for part, images in files.items()}
        return duplicate_warnings(listed(parts, self.source))

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.labels)

    def preprocessing(self, size: int) -> Preprocessing:
        """What happens to these images before a network of an image size (px) sees them."""
        return Preprocessing(size, self.channels, normalization=self.normalization, background=self.background)

    def in_memory(self, size: int) -> ImageDataset:
        """The same data set decoded once, unless it is kept so: shorter side scaled to `size` px, centre cut out.

        Damaged files that only show when they are decoded are left out and named.

        Raises:
            InvalidInputError: If too many files are unreadable.
        """
        unreadable = list(self.unreadable)
        train, val = (self._decoded(images, size, unreadable) for images in (self.train, self.val))
        _check_unreadable(unreadable, len(self.train) + len(self.val) + len(self.unreadable), self.source)
        return dataclasses.replace(self, train=train, val=val, unreadable=tuple(unreadable))

    def _decoded(self, images: ImageSet, size: int, unreadable: list[str]) -> ImageSet:
        if isinstance(images, FileImages) and size in images.pixels:
            return images
        pixels = np.empty((len(images), size, size, self.channels), np.uint8)
        preprocessing = self.preprocessing(size)
        kept: list[int] = []
        for i in range(len(images)):
            try:
                pixels[len(kept)] = images.prepared(i, preprocessing)
            except (InvalidInputError, OSError):
                unreadable.append(str(images.paths[i]) if isinstance(images, FileImages) else f"image {i}")
                continue
            kept.append(i)
        return ArrayImages(pixels[: len(kept)], images.targets[kept])


def _beside(unread: Mapping[str, int] | None) -> str:
    """What an error says of files that are not read."""
    return f", beside {unread_words(unread)}" if unread else ""


def _local(source: str) -> str:
    """A source, without ``file://`` before its path."""
    return unquote(urlsplit(source).path) if source.startswith("file:") else source


def _no_source(source: str, path: Path) -> InvalidInputError:
    """What to say of a source that is not there: where it was looked for, and how to get it here."""
    remedy = None
    if "://" in source or re.match(r"(runs|models|mlflow-artifacts|dbfs):/", source):
        remedy = (
            f"copy the images to this machine first: mlflow artifacts download --artifact-uri {shlex.quote(source)} "
            "--dst-path images, and give the absolute path of images"
        )
    elif not path.is_absolute():
        source = f"{source}, which is not in {Path.cwd()}"
        if "MLFLOW_RUN_ID" in os.environ:
            remedy = "mlflow run works in the project's directory: give an absolute path"
    return InvalidInputError(
        "data must be 'digits', 'glyphs', 'fashion-mnist' or the path of a folder or list",
        received=source,
        remedy=remedy,
    )


def load_dataset(
    source: str,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    max_train: int | None = None,
    max_val: int | None = None,
    sizes: Sequence[int] = (),
    keep: bool = False,
    digest: str = "",
    background: int = WHITE,
) -> ImageDataset:
    """Read a data set; of files, each is looked at once in its life.

    Args:
        source: ``digits``, ``glyphs``, ``fashion-mnist``, or the path of a folder or list, also as ``file:///...``.
        val_fraction: Share of each class set aside for validation where the source has no split.
        seed: Seed of the split and of the choice below.
        max_train: Use at most so many training images, drawn by class.
        max_val: Use at most so many validation images, drawn by class.
        sizes: Sizes in pixels that images will be asked for at: their pixels are found where they are kept.
        keep: Decode and keep those that are not, as far as there is room; see `foxnas_mlflow.data._cache`.
        digest: What it had when work on it began. Where only few files differ since, mended, broken or removed, it
            is the same set still: what is not there any more is skipped, what was replaced is used as it is now, what
            was not there is left out.
        background: Grey level, 0 to 255, behind transparent parts of pictures.

    Raises:
        InvalidInputError: If there is no such source, or it cannot be trained on; the message
            says why and names the file or class.
    """
    if not 0 < val_fraction < 1:
        raise InvalidInputError("val_fraction must be between 0 and 1", received=val_fraction)
    source = _local(source)
    limited = max_train is not None or max_val is not None
    reading = _Reading(val_fraction, seed, tuple(sizes), keep and not limited, keep, digest, background)
    if source == "digits":
        dataset = _digits(val_fraction, seed)
    elif source == "glyphs":
        dataset = _glyphs()
    elif source == "fashion-mnist":
        dataset = _idx(FASHION_MNIST, source, val_fraction, seed)
    else:
        path = Path(source).expanduser()
        if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
            dataset = _list(path, source, reading)
        elif path.is_dir():
            has_idx = any(is_idx(p) for p in path.iterdir() if p.is_file() and not is_junk(p.name))
            dataset = _idx(path, source, val_fraction, seed) if has_idx else _folder(path, source, reading)
        else:
            raise _no_source(source, path)
    if not limited:
        return _slim(dataset)
    if max_train is not None and max_train < dataset.n_classes:
        raise InvalidInputError(
            "max_train must leave an image of every class",
            received=f"max_train={max_train} for {dataset.n_classes} classes",
        )
    rng = listed_stream(seed, Stream.IMAGE_LIMIT)
    train, val = _at_most(dataset.train, max_train, rng), _at_most(dataset.val, max_val, rng)
    if sizes:
        train, val = (_with_pixels(images, sizes, keep) for images in (train, val))
    normalization = _normalization(train, dataset.channels)
    return _slim(dataclasses.replace(dataset, train=train, val=val, normalization=normalization))


def _slim(dataset: ImageDataset) -> ImageDataset:
    """Without what is needed no more of each of many files."""
    kept: dict[int, NDArray[Any]] = {}

    def slim(images: ImageSet) -> ImageSet:
        if not isinstance(images, FileImages):
            return images
        if id(images.facts) not in kept:
            looks = kept[id(images.facts)] = np.empty(len(images.facts), LOOKS)
            for name in looks.dtype.names or ():
                looks[name] = images.facts[name]
        return dataclasses.replace(images, facts=kept[id(images.facts)])

    test = None if dataset.test is None else slim(dataset.test)
    return dataclasses.replace(dataset, train=slim(dataset.train), val=slim(dataset.val), test=test)


@dataclass(frozen=True)
class _Reading:
    """How files are read: see `load_dataset`."""

    val_fraction: float
    seed: int
    sizes: tuple[int, ...]
    keep: bool
    remember: bool
    digest: str
    background: int


def _with_pixels(images: ImageSet, sizes: Sequence[int], keep: bool) -> ImageSet:
    """Pixels of these images alone where they are kept, those of the whole listing otherwise."""
    if not isinstance(images, FileImages):
        return images
    return dataclasses.replace(images, pixels={**images.pixels, **look_through(images.paths, sizes, keep=keep)[2]})


def stratified_split(
    targets: NDArray[np.int64], fraction: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split indices by class: at least one of each class on either side where it has two.

    Returns:
        Ascending indices of the rest and of the fraction.
    """
    chosen = []
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen.append(members[:count])
    taken = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(targets)), taken), taken


def choose_by_class(targets: NDArray[np.int64], limit: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw at most so many indices, of every class about the same share.

    There is at least one of each class where the limit allows it; where there are more classes, one of some.

    Args:
        targets: Class of each image (n,).
        limit: Most indices, at least 1.
        rng: Draws them.

    Returns:
        Ascending indices.
    """
    classes = [rng.permutation(np.flatnonzero(targets == label)) for label in np.unique(targets)]
    counts = np.array([max(round(limit / len(targets) * len(members)), 1) for members in classes])
    if counts.sum() > limit:
        # What was rounded up is taken back where it is missed least.
        order = rng.permutation(len(counts))
        while counts.sum() > limit:
            counts[order[counts[order].argmax()]] -= 1
    return np.sort(np.concatenate([members[:n] for members, n in zip(classes, counts, strict=True)]))


def grouped_split(
    targets: NDArray[np.int64], groups: NDArray[np.int64], fraction: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split indices by whole groups, so that about the same share of each class is taken.

    A class stays in the rest whole where all its images are in one group, or in groups that other classes need there.

    Args:
        targets: Class of each image (n,).
        groups: Its group (n,).
        fraction: Share of each class that is taken.
        rng: Draws the order in which groups are tried.

    Returns:
        Ascending indices of the rest and of the fraction.
    """
    total = np.bincount(targets)
    wanted = np.maximum(np.round(fraction * total), 1)
    taken = np.zeros(len(total), np.int64)
    chosen = np.zeros(int(groups.max()) + 1, bool)
    order = np.argsort(groups, kind="stable")
    members = dict(zip(*_runs(groups[order], order), strict=True))
    tried = rng.permutation(np.array(sorted(members)))
    # The second time a class that has none yet takes what there is.
    for needy in (False, True):
        for group in map(int, tried):
            labels, counts = np.unique(targets[members[group]], return_counts=True)
            useful = np.minimum(counts, np.maximum(wanted[labels] - taken[labels], 0)).sum()
            worth = (taken[labels] == 0).any() if needy else 2 * useful >= counts.sum()
            if not chosen[group] and worth and (taken[labels] + counts < total[labels]).all():
                chosen[group] = True
                taken[labels] += counts
    is_taken = chosen[groups]
    return np.flatnonzero(~is_taken), np.flatnonzero(is_taken)


def _runs(values: NDArray[np.int64], of: NDArray[np.int64]) -> tuple[list[int], list[NDArray[np.int64]]]:
    """Distinct values of a sorted array, and what stands beside each."""
    distinct, starts = np.unique(values, return_index=True)
    return distinct.tolist(), np.split(of, starts[1:])


def images_digest(images: ImageSet) -> str:
    """SHA-256 of images and their class indices, whatever order and names they have; files that broke do not count."""
    if isinstance(images, FileImages):
        images = images.unbroken()
        contents = images.facts["content"][images.paths.rows]
    else:
        hashes = (hashlib.blake2b(images[i].tobytes(), digest_size=16).digest() for i in range(len(images)))
        contents = np.frombuffer(b"".join(hashes), np.uint64).reshape(-1, 2)
    rows = np.column_stack([contents, images.targets.astype(np.uint64)])
    return hashlib.sha256(rows[np.lexsort(rows.T)].tobytes()).hexdigest()


def prepared_batches(
    images: ImageSet, preprocessing: Preprocessing, index: NDArray[np.integer] | None = None, *, batch_size: int = 250
) -> Iterator[tuple[ImageArray, NDArray[np.int64]]]:
    """Images as a served model gets them, before normalisation; files that broke since are named and left out.

    Args:
        images: The images.
        preprocessing: What serving does to an image.
        index: Which images, in which order; None: all.
        batch_size: Images a batch.

    Yields:
        uint8 (n, image_size, image_size, channels), and their class indices (n,).
    """
    chosen = np.arange(len(images)) if index is None else index
    for start in range(0, len(chosen), batch_size):
        pixels, targets, broken = [], [], []
        for i in map(int, chosen[start : start + batch_size]):
            try:
                pixels.append(images.prepared(i, preprocessing))
            except (InvalidInputError, OSError):
                broken.append(i)
                continue
            targets.append(images.targets[i])
        if broken and isinstance(images, FileImages):
            images.say_broken(broken)
        if pixels:
            yield np.stack(pixels), np.asarray(targets, np.int64)


def calibration_images(dataset: ImageDataset, preprocessing: Preprocessing, n: int, *, seed: int) -> ImageArray:
    """Training images, drawn by class, that the ranges of a network's activations are measured on.

    Args:
        dataset: The data set.
        preprocessing: What serving does to an image.
        n: At most so many.
        seed: Seed of the choice and of the order.

    Returns:
        uint8 (n, image_size, image_size, channels).
    """
    rng = listed_stream(seed, Stream.QUANTIZATION_IMAGES)
    index = np.arange(len(dataset.train))
    if n < len(index):
        index = choose_by_class(dataset.train.targets, n, rng)
    return np.concatenate(
        [images for images, _ in prepared_batches(dataset.train, preprocessing, rng.permutation(index))]
    )


def _at_most(images: ImageSet, limit: int | None, rng: np.random.Generator) -> ImageSet:
    if limit is None or limit >= len(images):
        return images
    if limit < 1:
        raise InvalidInputError("a number of images must be positive", received=limit)
    return _subset(images, choose_by_class(images.targets, limit, rng))


def _subset(images: ImageSet, index: NDArray[np.int64]) -> ImageSet:
    if isinstance(images, FileImages):
        return images.take(index)
    if isinstance(images, ArrayImages):
        return ArrayImages(images.images[index], images.targets[index])
    raise TypeError(type(images).__name__)


def _assemble(
    source: str,
    labels: Sequence[str],
    train: ImageSet,
    val: ImageSet | None,
    channels: int,
    digest: str,
    unreadable: Sequence[str] = (),
    *,
    split: tuple[float, int],
    unread: Mapping[str, int] | None = None,
) -> ImageDataset:
    """Check the classes, split where there is no validation set, and measure the normalisation."""
    drawn_split = val is None
    if val is None:
        _check_classes(source, labels, train, unread)
        counts = np.bincount(train.targets, minlength=len(labels))
        if counts.min() < 2:
            raise InvalidInputError(
                "every class needs two readable images, one to train on and one to validate on",
                received=labels[int(counts.argmin())] + _beside(unread),
            )
        rest, taken = _split(train, labels, split[0], listed_stream(split[1], Stream.VALIDATION_SPLIT))
        train, val = _subset(train, rest), _subset(train, taken)
    _check_classes(source, labels, train, unread)
    if not len(val):
        raise InvalidInputError("the validation set must have images", received=source)
    return ImageDataset(
        source,
        tuple(labels),
        train,
        val,
        channels,
        _normalization(train, channels),
        digest,
        tuple(unreadable),
        unread=dict(unread or {}),
        drawn_split=drawn_split,
    )


def _split(
    images: ImageSet, labels: Sequence[str], fraction: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `stratified_split`, but groups stay on one side."""
    if not isinstance(images, FileImages) or images.groups is None:
        return stratified_split(images.targets, fraction, rng)
    rest, taken = grouped_split(images.targets, images.groups[images.paths.rows], fraction, rng)
    for label in range(len(labels)):
        if not (images.targets[taken] == label).any():
            raise InvalidInputError(
                "every class needs images in two groups or more, one to train on and one to validate on",
                received=labels[label],
                remedy="add images of another group, or a split column",
            )
    return rest, taken


def _check_classes(source: str, labels: Sequence[str], train: ImageSet, unread: Mapping[str, int] | None) -> None:
    if len(labels) < 2:
        raise InvalidInputError(
            "a data set needs at least two classes",
            received=f"{len(labels)} in {source}",
            remedy="make one folder a class, with its images inside",
        )
    counts = np.bincount(train.targets, minlength=len(labels))
    if counts.min() < 1:
        raise InvalidInputError(
            "every class needs readable training images",
            received=labels[int(counts.argmin())] + _beside(unread),
        )


def _normalization(train: ImageSet, channels: int) -> Normalization:
    """Mean and std in 0..1 over evenly spaced training images, all of the same weight."""
    index = np.unique(np.linspace(0, len(train) - 1, min(len(train), _STATISTICS_IMAGES)).astype(int))
    if isinstance(train, FileImages):
        facts = train.facts[train.paths.rows[index]]
        facts = facts[facts["whole"]]
        means, squares = facts["mean"], facts["square"]
    else:
        pixels = [train[i].reshape(-1, channels) / 255.0 for i in map(int, index)]
        means = np.array([p.mean(axis=0) for p in pixels])
        squares = np.array([np.square(p).mean(axis=0) for p in pixels])
    mean, square = means.mean(axis=0, dtype=np.float64), squares.mean(axis=0, dtype=np.float64)
    # A set of flat images has no deviation to divide by.
    std = np.sqrt(np.maximum(square - mean**2, 1e-4))
    return Normalization(tuple(np.round(mean, 6)), tuple(np.round(std, 6)))


def _glyphs() -> ImageDataset:
    images, targets, n_train = glyphs()
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    train, val = (ArrayImages(images[part], targets[part]) for part in (slice(n_train), slice(n_train, None)))
    return ImageDataset("glyphs", tuple(LETTERS), train, val, 3, _normalization(train, 3), digest)


def _digits(val_fraction: float, seed: int) -> ImageDataset:
    package = getattr(importlib.util.find_spec("sklearn"), "origin", None)
    if package is None:
        package = import_or_raise("sklearn", extra="train", feature="the digits data set").__file__
    # What sklearn.datasets.load_digits reads, without the two seconds that importing it takes.
    file = Path(str(package)).with_name("datasets") / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    images = np.round(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[..., None]
    digest = hashlib.sha256(images.tobytes()).hexdigest()
    every = ArrayImages(images, table[:, 64])
    return _assemble("digits", [str(i) for i in range(10)], every, None, 1, digest, split=(val_fraction, seed))


def _idx(path: Path, source: str, val_fraction: float, seed: int) -> ImageDataset:
    if not path.is_dir():
        raise InvalidInputError(
            "the Fashion-MNIST files must be installed",
            received=f"no {path}",
            remedy="apt-get install dataset-fashion-mnist, or give a folder of IDX files",
        )
    parts, digest = {}, hashlib.sha256()
    for part in ("train", "t10k"):
        found = [_find_idx(path, part, kind) for kind in ("images", "labels")]
        if part == "t10k" and None in found:
            continue
        arrays = []
        for file, kind in zip(found, ("images", "labels"), strict=True):
            if file is None:
                raise InvalidInputError(f"an IDX folder needs {part}-{kind}-idx files", received=str(path))
            arrays.append(_read_idx(file))
            digest.update(arrays[-1].tobytes())
        images, targets = arrays
        if images.ndim != 3 or targets.shape != (len(images),):
            raise InvalidInputError(
                "IDX images must be (n, height, width) with as many labels",
                received=f"{images.shape} and {targets.shape}",
            )
        parts[part] = ArrayImages(images[..., None], targets.astype(np.int64))
    # Some begin with 1, as EMNIST's letters do.
    present = np.unique(parts["train"].targets)
    for part, labelled in parts.items():
        extra = np.setdiff1d(labelled.targets, present)
        if len(extra):
            raise InvalidInputError(
                "every class of the test files must be in the training files", received=f"class {extra[0]} in {path}"
            )
        parts[part] = dataclasses.replace(labelled, targets=np.searchsorted(present, labelled.targets))
    labels = _FASHION_LABELS if source == "fashion-mnist" else [str(label) for label in present]
    dataset = _assemble(
        source, labels, parts["train"], parts.get("t10k"), 1, digest.hexdigest(), split=(val_fraction, seed)
    )
    return dataclasses.replace(dataset, notes=(validated_on("t10k"),)) if "t10k" in parts else dataset


_FASHION_LABELS = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


_IDX_NAMES = {"train": ("train",), "t10k": ("t10k", "test")}
"""What a part's files have in their names; EMNIST's begin with its own, and its test files are called that."""


def _find_idx(path: Path, part: str, kind: str) -> Path | None:
    names = [f"{name}-{kind}" for name in _IDX_NAMES[part]]
    found = [p for p in sorted(path.iterdir()) if any(name in p.name for name in names) and is_idx(p)]
    # A file may be there packed and unpacked.
    if len({p.name.removesuffix(".gz") for p in found}) > 1:
        raise InvalidInputError(
            "an IDX folder must hold one data set",
            received=f"{found[0].name} and {found[-1].name}",
            remedy="move the files of one into a folder of their own",
        )
    return found[0] if found else None


def _read_idx(path: Path) -> ImageArray:
    """An IDX file of unsigned bytes, compressed with gzip or not."""
    try:
        with open_unpacked(path) as file:
            zeros, kind, n_dimensions = struct.unpack(">HBB", file.read(4))
            shape = struct.unpack(f">{n_dimensions}I", file.read(4 * n_dimensions))
            data = file.read()
    except (*UNREADABLE, struct.error) as error:
        raise InvalidInputError("an IDX file must be readable", received=path.name) from error
    if zeros != 0 or kind != 8 or len(data) != int(np.prod(shape)):
        raise InvalidInputError("an IDX file must hold unsigned bytes of the size it states", received=path.name)
    return np.frombuffer(data, np.uint8).reshape(shape)


def _folder(path: Path, source: str, reading: _Reading) -> ImageDataset:
    folders, notes = find_parts(find_root(path))
    labels = list(subfolders(folders.get("train") or folders[""]))
    for name in ("val", "test"):
        extra = sorted(set(subfolders(folders[name])) - set(labels)) if name in folders else []
        if extra:
            raise InvalidInputError(
                f"every class of the {'validation' if name == 'val' else name} folder must be in the training folder",
                received=extra[0],
                remedy="remove it, or add training images of it",
            )
    found = {
        part: pictures_of(folder, [label for label in labels if (folder / label).is_dir()])
        for part, folder in folders.items()
    }
    dataset = _pictures(found, labels, source, reading)
    return dataclasses.replace(dataset, notes=(*dataset.notes, *notes))


def _list(path: Path, source: str, reading: _Reading) -> ImageDataset:
    every = pictures_of_list(path)
    found: dict[str, Pictures] = {}
    for name, label, part in zip(every.names, every.labels, every.parts, strict=True):
        pictures = found.setdefault(part, Pictures(every.root))
        pictures.names.append(name)
        pictures.labels.append(label)
    for name, group in zip(every.parts, every.groups, strict=True) if every.groups else ():
        found[name].groups.append(group)
    dataset = _pictures(found, sorted(set(every.labels)), source, reading, is_list=True)
    split = {part: set(pictures.groups) for part, pictures in found.items()}
    return dataclasses.replace(dataset, notes=(*dataset.notes, *every.notes, *_straddling(split)))


def _straddling(groups: Mapping[str, set[str]]) -> Iterator[str]:
    """Warnings of groups that lie on both sides of a split."""
    for one, other in itertools.combinations(groups, 2):
        both = sorted(groups[one] & groups[other])
        if both:
            yield f"groups in both {one} and {other} images: {len(both)} ({', '.join(both[:3])})"


def _pictures(
    found: Mapping[str, Pictures], labels: list[str], source: str, reading: _Reading, *, is_list: bool = False
) -> ImageDataset:
    """A data set of the pictures that are whole.

    Its digest is of names, sizes and contents; in a folder a name has its class in it, in a list class, part and group
    count too. Where work began with the digest of a release before, without contents, it is that one.
    """
    for label in labels:
        if label.encode("utf-8", "replace").decode() != label:
            raise InvalidInputError(
                "the name of a class must be UTF-8",
                received=ascii(label),
                remedy="rename it, a folder for example with: convmv -f latin1 -t utf8 -r --notest FOLDER",
            )
    unreadable: list[str] = []
    unread: Counter[str] = Counter()
    full, before = hashlib.sha256(), hashlib.sha256()
    looked: dict[str, _Looked] = {}
    target = {label: i for i, label in enumerate(labels)}
    for part in sorted(found, key=("", "train", "val", "test").index):
        pictures = found[part]
        unread += pictures.unread
        paths = Paths(pictures.root, pictures.names)
        facts, n_bytes, pixels = look_through(paths, reading.sizes, keep=reading.keep)
        unreadable += [str(path) for path in paths.take(np.flatnonzero(~facts["whole"]))]
        for i in np.flatnonzero(facts["whole"]):
            fact = f"{pictures.names[int(i)]}:{n_bytes[i]}"
            fact += f":{pictures.labels[i]}:{part}" if is_list else ""
            fact += f":{pictures.groups[i]}\n" if pictures.groups else "\n"
            line = fact.encode("utf-8", "surrogateescape")
            before.update(line)
            full.update(line + facts["content"][i].tobytes())
        targets = np.array([target[label] for label in pictures.labels], np.int64)
        groups = np.unique(pictures.groups, return_inverse=True)[1] if pictures.groups else None
        whole, contents = facts["whole"].copy(), facts["content"].copy()
        listed_part = ListedPart(pictures.names, n_bytes, whole, targets, groups, contents)
        looked[part] = _Looked(paths, listed_part, facts, pixels)
    now = Listing(tuple(labels), {name: part.listed for name, part in looked.items()})
    digest = reading.digest if reading.digest == before.hexdigest() else full.hexdigest()
    begun = _as_begun(now, digest, source, reading)
    if begun is not None:
        roots = {name: pictures.root for name, pictures in found.items()}
        return _gone_on_with(begun, now, roots, source, reading)
    _check_unreadable(unreadable, sum(len(part.paths) for part in looked.values()), source, unread)
    dataset = _of_parts(looked, labels, source, digest, unreadable, reading, unread)
    dataset = dataclasses.replace(dataset, earlier_digest=before.hexdigest())
    if reading.remember:
        mean, std = dataset.normalization.mean, dataset.normalization.std
        keep_listing(Path(source).expanduser(), dataset.digest, dataclasses.replace(now, mean=mean, std=std))
    return dataset


@dataclass(frozen=True, eq=False)
class _Looked:
    """Pictures that were looked at: their facts, and their pixels by size."""

    paths: Paths
    listed: ListedPart
    facts: NDArray[Any]
    pixels: Mapping[int, Pixels]


def _of_parts(
    looked: Mapping[str, _Looked],
    labels: Sequence[str],
    source: str,
    digest: str,
    unreadable: Sequence[str],
    reading: _Reading,
    unread: Mapping[str, int] | None = None,
) -> ImageDataset:
    """The pictures of each part that are listed as whole; they share what is known to be broken."""
    broken: set[str] = set()
    sets: dict[str, FileImages] = {}
    for name, part in looked.items():
        kept, listed_part = np.flatnonzero(part.listed.whole), part.listed
        sets[name] = FileImages(
            part.paths.take(kept),
            listed_part.targets[kept],
            part.facts,
            part.pixels,
            listed_part.groups,
            broken,
            background=reading.background,
        )
    nothing = FileImages(Paths(Path(), Names()), np.empty(0, np.int64), np.empty(0, FACTS))
    dataset = _assemble(
        source,
        labels,
        sets.get("train", sets.get("", nothing)),
        sets.get("val"),
        3,
        digest,
        unreadable,
        split=(reading.val_fraction, reading.seed),
        unread=unread,
    )
    return dataclasses.replace(dataset, test=sets.get("test"), background=reading.background)


def _as_begun(now: Listing, digest: str, source: str, reading: _Reading) -> Listing | None:
    """The listing that work began with, where it is another one than now's and little of it was lost."""
    if reading.digest in ("", digest):
        return None
    begun = open_listing(Path(source).expanduser(), reading.digest)
    if begun is None or not begun.is_like(now) or begun.n_lost(now) > MAX_UNREADABLE * begun.n_whole:
        return None
    return begun


def _gone_on_with(
    begun: Listing, now: Listing, roots: Mapping[str, Path], source: str, reading: _Reading
) -> ImageDataset:
    """The data set as it was listed; pictures that are not whole any more are broken, others are as they are now."""
    looked: dict[str, _Looked] = {}
    lost: list[str] = []
    replaced: list[str] = []
    for name, part in begun.parts.items():
        paths = Paths(roots[name], part.names)
        facts, n_bytes, pixels = look_through(paths, reading.sizes, keep=reading.keep)
        looked[name] = _Looked(paths, part, facts, pixels)
        others = n_bytes != part.n_bytes
        if part.contents is not None:
            others |= (facts["content"] != part.contents).any(axis=1)
        lost += [str(path) for path in paths.take(np.flatnonzero(part.whole & ~facts["whole"]))]
        replaced += [str(path) for path in paths.take(np.flatnonzero(part.whole & facts["whole"] & others))]
    dataset = _of_parts(looked, begun.labels, source, reading.digest, (), reading)
    n_new = now.n_whole - (begun.n_whole - len(lost))
    notes = []
    if lost:
        notes.append(
            f"{len(lost)} pictures of when work on them began are not whole any more and are skipped: "
            f"{', '.join(lost[:5])}"
        )
    if replaced:
        notes.append(
            f"{len(replaced)} pictures were replaced since work on them began, and are used as they are now: "
            f"{', '.join(replaced[:5])}"
        )
    if n_new:
        notes.append(f"{n_new} pictures that were damaged or not there when work on them began are left out")
    for images in (dataset.train, dataset.val):
        if isinstance(images, FileImages):
            images.broken.update(lost)
    return dataclasses.replace(dataset, normalization=Normalization(begun.mean, begun.std), notes=tuple(notes))


def _left_out_for_size(name: str) -> bool:
    """Whether a file that could not be read is nothing but too large."""
    try:
        return is_too_large(Path(name).read_bytes(), shorter=STATISTICS_SIDE)
    except OSError:
        return False


def _check_unreadable(
    unreadable: Sequence[str], total: int, source: str, unread: Mapping[str, int] | None = None
) -> None:
    if total == 0:
        raise InvalidInputError(
            "a folder of images needs one folder a class with pictures",
            received=f"no image in {source}{_beside(unread)}",
        )
    if len(unreadable) > MAX_UNREADABLE * total:
        raise InvalidInputError(
            f"at most {MAX_UNREADABLE:.0%} of the images may be unreadable",
            received=f"{len(unreadable)} of {total}, the first is {unreadable[0]}"
            + (", which has too many pixels" if _left_out_for_size(unreadable[0]) else ""),
            remedy=reader_for([Path(unreadable[0]).suffix.lower()]) or "remove or replace them",
        )
