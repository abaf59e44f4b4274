"""The images that a registered network was trained on, read again for a step that follows, and those it must reject."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._workflow import logger

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from foxnas_mlflow.data import ImageDataset
    from foxnas_mlflow.data.preprocess import Preprocessing
    from foxnas_mlflow.flavor import SubnetModel
    from foxnas_mlflow.supernet import Batches

CALIBRATION_IMAGES = 200
"""Training images that the ranges of activations are measured on."""

_NAMED_FILES = 5


def images_of(subnet: SubnetModel, source: str, *, seed: int = 0, **options: Any) -> ImageDataset:
    """Read images as a subnet was trained on them.

    Split alike, without files that broke since, on the same background, as many to train on, with the same
    normalisation.

    Args:
        subnet: The subnet.
        source: Where the images are now.
        seed: Seed of the split where the subnet does not tell that of its training: any other would set images aside
            that it was trained on.
        options: Further ones of `foxnas_mlflow.data.load_dataset`, or others in place of the training's: its
            `max_train` counts where none is given here.

    Raises:
        InvalidInputError: If they are other images whose split is drawn anew: among the validation images there may be
            some that it was trained on.
    """
    import dataclasses

    from foxnas_mlflow.data import load_dataset
    from foxnas_mlflow.data.preprocess import WHITE

    digest = str(subnet.details.get("data_digest", ""))
    its: dict[str, Any] = {
        "digest": digest,
        "background": WHITE if subnet.preprocessing is None else subnet.preprocessing.background,
        "max_train": subnet.details.get("training", {}).get("max_train") or None,
    }
    seed = int(subnet.details.get("data_seed", seed))
    dataset = load_dataset(source, seed=seed, **its | options)
    if digest and dataset.digest != digest and dataset.drawn_split:
        raise InvalidInputError(
            "data must be the images that the network was trained on, or be split by folders train and val",
            received=f"{dataset.source} with the digest {dataset.digest[:12]}, not {digest[:12]}",
            remedy="give the same images, or put those that it has never seen into a folder val beside train",
        )
    if subnet.preprocessing is None:
        return dataset
    return dataclasses.replace(dataset, normalization=subnet.preprocessing.normalization)


def batches_of(
    subnet: SubnetModel,
    dataset: ImageDataset,
    *,
    batch_size: int,
    augment: bool,
    seed: int,
) -> Batches:
    """Training batches whose images are drawn and mirrored as in the training of a subnet's supernet.

    Args:
        subnet: The subnet.
        dataset: Its images.
        batch_size: Images a batch.
        augment: Crop, colour and erase at random too.
        seed: Seed of order and augmentation.
    """
    from foxnas_mlflow.supernet import Batches

    training = subnet.details.get("training", {})
    return Batches(
        dataset.train,
        normalization=dataset.normalization,
        image_size=subnet.architecture.image_size,
        batch_size=batch_size,
        flip=training.get("flip", dataset.may_mirror),
        augment=augment,
        balanced=training.get("sampling") == "balanced",
        seed=seed,
    )


def class_weights_of(subnet: SubnetModel) -> tuple[float, ...]:
    """Weight of each class in the loss of the training of a subnet's supernet; empty: all alike."""
    return tuple(subnet.details.get("training", {}).get("class_weights", ()))


def find_unknown(folder: str) -> tuple[list[Path], Mapping[str, int]]:
    """The pictures of none of the classes, and how many files of each suffix are none that are read.

    They are found as those of the classes are.

    Raises:
        InvalidInputError: If there is no such folder, or no picture in it that can be read.
    """
    from pathlib import Path

    from foxnas_mlflow.data import pictures_below, unread_words
    from foxnas_mlflow.data.preprocess import Preprocessing

    rule = "unknown must be a folder of pictures that are none of the classes"
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InvalidInputError(rule, received=folder)
    found = pictures_below(root)
    paths = [found.root / name for name in found.names]
    if all(_decoded(path, Preprocessing(8)) is None for path in paths):
        beside = f", beside {unread_words(found.unread)}" if found.unread else ""
        raise InvalidInputError(rule, received=f"{folder}: {len(paths)} pictures, none of which can be read{beside}")
    return paths, found.unread


def unknown_images(folder: str, preprocessing: Preprocessing) -> NDArray[np.uint8] | None:
    """The pictures of none of the classes, (n, size, size, channels); None where none is given."""
    if not folder:
        return None
    import numpy as np

    from foxnas_mlflow.data import unread_words

    paths, unread = find_unknown(folder)
    images = [_decoded(path, preprocessing) for path in paths]
    damaged = [str(path) for path, image in zip(paths, images, strict=True) if image is None]
    if unread:
        logger.warning("unknown: files that are not read: %s", unread_words(unread))
    if damaged:
        logger.warning("unknown: %d damaged files are left out: %s", len(damaged), ", ".join(damaged[:_NAMED_FILES]))
    return np.stack([image for image in images if image is not None])


def _decoded(path: Path, preprocessing: Preprocessing) -> NDArray[np.uint8] | None:
    """A picture as a network gets it; None if it cannot be read."""
    try:
        return preprocessing.decode(path.read_bytes())
    except (InvalidInputError, OSError):
        return None
