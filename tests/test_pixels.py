"""One way from picture to answer: training, evaluation, calibration, serving and the board see the same pixels."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.data import ArrayImages, FileImages, ImageDataset, Preprocessing, calibration_images, load_dataset
from foxnas_mlflow.deploy._bundle import Options, bundle
from foxnas_mlflow.flavor import TfliteModel
from foxnas_mlflow.flavor._pyfunc import TflitePyfunc, default_model_config
from foxnas_mlflow.runtime import Classifier
from foxnas_mlflow.tflite import Int8Model, write_probe

torch = pytest.importorskip("torch")

SIZE = 32


def exif_jpeg(pixels: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(pixels), "JPEG", exif=exif, quality=90)


def alpha_png(pixels: np.ndarray) -> bytes:
    alpha = np.linspace(0, 255, pixels[..., 0].size).reshape(pixels.shape[:2]).astype(np.uint8)
    return saved(Image.fromarray(np.dstack([pixels, alpha])), "PNG")


def sixteen_bits(pixels: np.ndarray) -> bytes:
    return saved(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257 + 3), "PNG")


def cmyk_jpeg(pixels: np.ndarray) -> bytes:
    return saved(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=90)


def grey_png(pixels: np.ndarray) -> bytes:
    return saved(Image.fromarray(pixels[..., 0]), "PNG")


def large_photo(pixels: np.ndarray) -> bytes:
    """So large that its decoder leaves pixels out."""
    return saved(Image.fromarray(pixels).resize((900, 640)), "JPEG", quality=90)


def saved(image: Any, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


PICTURES = {
    "exif.jpg": exif_jpeg,
    "alpha.png": alpha_png,
    "sixteen.png": sixteen_bits,
    "cmyk.jpg": cmyk_jpeg,
    "grey.png": grey_png,
    "photo.jpg": large_photo,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            corners = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
            pixels = np.asarray(Image.fromarray(corners).resize((57, 41), Image.Resampling.BICUBIC))
            for name, encode in PICTURES.items():
                (root / part / label / name).write_bytes(encode(pixels))
    return load_dataset(str(root))


@pytest.fixture(scope="module")
def model(dataset: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> TfliteModel:
    """A network with random weights: other pixels give other outputs."""
    path = tmp_path_factory.mktemp("model") / "model.tflite"
    space = CPU_SPACE.replace(n_classes=2, image_sizes=(SIZE,))
    path.write_bytes(write_probe(build_network(space, space.smallest(SIZE))))
    return TfliteModel(path, dataset.labels, dataset.preprocessing(SIZE))


def of_training(images: Any, dataset: ImageDataset) -> np.ndarray:
    """What a network in training sees without augmentation: float32 (n, height, width, channels), in their order."""
    from foxnas_mlflow.supernet import Batches

    kept = []
    for i in range(len(images)):
        one = np.array([i, i])  # Batch norm wants two.
        pair: Any
        if isinstance(images, FileImages):
            pair = images.take(one)
        else:
            pair = ArrayImages(images.images[one], images.targets[one])
        batches = Batches(
            pair, normalization=dataset.normalization, image_size=SIZE, batch_size=2, flip=False, augment=False
        )
        ((x, _),) = batches.epoch(0)
        np.testing.assert_array_equal(x[0], x[1])
        kept.append(x[0].permute(1, 2, 0).numpy())
    return np.stack(kept)


def of_evaluation(dataset: ImageDataset) -> np.ndarray:
    """What a network sees that is evaluated, in the order of the validation images."""
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.supernet import SubnetEvaluator, Supernet

    seen: list[np.ndarray] = []

    class Watcher(torch.nn.Module):  # type: ignore[name-defined, misc]
        def forward(self, x: Any) -> Any:
            seen.append(x.permute(0, 2, 3, 1).numpy())
            return torch.zeros(len(x), 2)

    space = get_space("cpu").replace(n_classes=2, image_sizes=(SIZE,))
    evaluator = SubnetEvaluator(Supernet(space), dataset)
    watcher: Any = Watcher()
    evaluator.accuracy(watcher, SIZE)
    # The first batch is of the statistics of batch norm.
    return seen[-1]


def test_five_ways_see_the_same_pixels(
    dataset: ImageDataset, model: TfliteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = dataset.val
    assert isinstance(files, FileImages)
    data = [path.read_bytes() for path in files.paths]
    assert len(data) == 2 * len(PICTURES)
    trained, evaluated = of_training(files, dataset), of_evaluation(dataset)
    np.testing.assert_array_equal(trained, evaluated)

    # Calibration takes training images in another order: here the validation images are its training images.
    import dataclasses

    same = dataclasses.replace(dataset, train=files)
    calibrated = calibration_images(same, model.preprocessing, len(data), seed=3)
    assert sorted(image.tobytes() for image in dataset.normalization(calibrated)) == sorted(
        image.tobytes() for image in trained
    )

    # Serving and the board quantize: what arrives at the interpreter is watched, and is that of training quantized.
    given: list[np.ndarray] = []
    real = Classifier.quantize

    def watched(self: Classifier, image: np.ndarray) -> np.ndarray:
        given.append(real(self, image))
        return given[-1]

    monkeypatch.setattr(Classifier, "quantize", watched)
    expected = Int8Model(model.path, normalization=dataset.normalization)
    classifier = Classifier(model.path, dataset.normalization)
    quantized = [classifier._quantized(image) for image in trained]
    served = TflitePyfunc(model, default_model_config("tflite") | {"pool_size": 1}).predict(
        pd.DataFrame({"image": data})
    )
    np.testing.assert_array_equal(given, quantized)
    prepared = np.stack([model.preprocessing.decode(each) for each in data])
    np.testing.assert_array_equal(expected.quantize(prepared), quantized)

    # On a board it is another process, with its own copy of the code.
    for name, content in bundle(
        model, Options(), name="camera", kind="tflite", source="models:/m/1", model_id=None
    ).items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "runner.pyz"), "classify", *map(str, files.paths)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    answers = json.loads(done.stdout)["predictions"]
    assert [row["probabilities"] for row in answers] == served["probabilities"].tolist()
    assert len({tuple(row["probabilities"]) for row in answers}) > len(PICTURES)


def test_images_in_memory_are_resized_once_and_as_served(dataset: ImageDataset, rng: np.random.Generator) -> None:
    """Digits have 8 px: a network of another size sees in training what it sees when it is served."""
    images = ArrayImages(rng.integers(0, 256, (3, 20, 20, 3), dtype=np.uint8), np.array([0, 1, 1]))
    expected = [dataset.normalization(dataset.preprocessing(SIZE).resize(image)) for image in images.images]
    np.testing.assert_array_equal(of_training(images, dataset), expected)
    # The same through a data set that is decoded once.
    kept = dataset.in_memory(SIZE)
    np.testing.assert_array_equal(of_training(kept.val, dataset), of_training(dataset.val, dataset))


def test_a_background_and_a_crop_reach_every_way(dataset: ImageDataset) -> None:
    """What a model was logged with decides, not the data set's own habit."""
    files = dataset.val
    assert isinstance(files, FileImages)
    described = Preprocessing(SIZE, 3, 0.875, dataset.normalization, background=0)
    (i,) = [k for k, path in enumerate(files.paths) if path.name == "alpha.png" and path.parent.name == "a"]
    np.testing.assert_array_equal(files.prepared(i, described), described.decode(files.paths[i].read_bytes()))
    assert (files.prepared(i, described) != files.prepared(i, dataset.preprocessing(SIZE))).any()
