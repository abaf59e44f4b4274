"""Images on their way into a network, the same in training, evaluation and serving."""

from foxnas_mlflow.data._answers import Evaluation, evaluate, packed, unpacked
from foxnas_mlflow.data._datasets import (
    ArrayImages,
    FileImages,
    ImageDataset,
    ImageSet,
    calibration_images,
    choose_by_class,
    images_digest,
    load_dataset,
    prepared_batches,
)
from foxnas_mlflow.data._listings import earlier_digests
from foxnas_mlflow.data._sources import pictures_below, unread_words
from foxnas_mlflow.data._vary import Variations
from foxnas_mlflow.data.preprocess import Normalization, Preprocessing, resize

__all__ = [
    "ArrayImages",
    "Evaluation",
    "FileImages",
    "ImageDataset",
    "ImageSet",
    "Normalization",
    "Preprocessing",
    "Variations",
    "calibration_images",
    "choose_by_class",
    "earlier_digests",
    "evaluate",
    "images_digest",
    "load_dataset",
    "packed",
    "pictures_below",
    "prepared_batches",
    "resize",
    "unpacked",
    "unread_words",
]
