"""A tiny int8 TFLite classifier whose right answers are known: the dominant colour of an image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from foxnas_mlflow.data.preprocess import Normalization, Preprocessing
from foxnas_mlflow.flavor import TfliteModel

LABELS = ("red", "green", "blue")
SIZE = 32
PREPROCESSING = Preprocessing(SIZE, 3, 0.875, Normalization((0.5, 0.4, 0.3), (0.25, 0.3, 0.35)))

# TensorFlow runs in a process of its own: it takes seconds to import, and its warnings are not ours.
_BUILD = """
import sys
import numpy as np
import tensorflow as tf

inputs = tf.keras.Input((32, 32, 3), batch_size=1)
x = tf.keras.layers.Conv2D(3, 1, name="colours")(inputs)
x = tf.keras.layers.GlobalAveragePooling2D()(x)
outputs = tf.keras.layers.Dense(3, name="scores")(x)
model = tf.keras.Model(inputs, outputs)
model.get_layer("colours").set_weights([np.eye(3)[None, None] * 1.0, np.zeros(3)])
model.get_layer("scores").set_weights([4.0 * np.eye(3) - 1.0, np.zeros(3)])
rng = np.random.default_rng(0)

def representative():
    for _ in range(64):
        base = rng.uniform(-2, 2, (1, 1, 1, 3))
        yield [np.clip(base + rng.normal(0, 0.3, (1, 32, 32, 3)), -2, 2).astype(np.float32)]

converter = tf.lite.TFLiteConverter.from_keras_model(model)
converter.optimizations = [tf.lite.Optimize.DEFAULT]
converter.representative_dataset = representative
converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
converter.inference_input_type = tf.int8
converter.inference_output_type = tf.dtypes.as_dtype(sys.argv[2])
open(sys.argv[1], "wb").write(converter.convert())
"""


def convert_colour_model(path: Path, output: str = "int8") -> None:
    """Convert the network."""
    result = subprocess.run([sys.executable, "-c", _BUILD, str(path), output], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stderr[-2000:])


def colour_model(path: Path) -> TfliteModel:
    """The converted network, described."""
    return TfliteModel(path, LABELS, PREPROCESSING, "logits")


def image_of(colour: str, *, height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """A noisy uint8 image (height, width, 3) of one dominant colour; every seed has its own shade."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, rng.integers(40, 120, 3), (height, width, 3))
    image[..., LABELS.index(colour)] += rng.integers(100, 136)
    return image.astype(np.uint8)


def encoded(image: np.ndarray, file_format: str = "JPEG") -> bytes:
    """The bytes of an image file."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=file_format)
    return buffer.getvalue()
