from __future__ import annotations

import os

import numpy as np
import pytest

from foxnas_mlflow.core.network import Network, build_network
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE, SearchSpace
from foxnas_mlflow.data import Normalization

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SMALL_CPU = CPU_SPACE.replace(image_sizes=(32, 48, 64), width_mult=0.5, n_classes=10)
SMALL_TPU = TPU_SPACE.replace(image_sizes=(32, 48, 64), width_mult=0.5, n_classes=10)
NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def sample_network(space: SearchSpace, image_size: int, seed: int = 0) -> Network:
    return build_network(space, space.sample(np.random.default_rng(seed), image_size=image_size))


def sample_images(n: int, size: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth random images: neighbouring pixels agree, as in photographs."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, -(-size // 4), -(-size // 4), channels))
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :size, :size]
    return np.clip(images + rng.integers(-20, 21, images.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def images() -> np.ndarray:
    return sample_images(16, 32)
