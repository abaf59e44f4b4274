"""An example of the input of each kind, saved with a model and shown on its page."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import pandas as pd

from foxnas_mlflow.flavor._models import SubnetModel, TfliteModel


def input_example_of(model: Any) -> pd.DataFrame:
    """One row that the model answers: a grey image of its size, or a network of its space."""
    if isinstance(model, TfliteModel):
        return pd.DataFrame({"image": [grey_png(model.preprocessing.image_size, model.preprocessing.channels)]})
    if isinstance(model, SubnetModel):
        architecture = model.architecture
    else:
        sizes = getattr(model, "image_sizes", None) or model.space.image_sizes
        architecture = model.space.smallest(sizes[0])
    return pd.DataFrame({"architecture": [architecture.to_json()]})


def grey_png(size: int, channels: int) -> bytes:
    """A grey square as a PNG file, made without Pillow: a model is also logged where it cannot run."""
    rows = (b"\0" + b"\x80" * (size * channels)) * size
    header = struct.pack(">IIBBBBB", size, size, 8, 2 if channels == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
