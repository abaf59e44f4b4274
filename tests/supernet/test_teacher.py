"""Teachers from outside see the images that the batches show, and are held to what a teacher is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.data import Normalization
from foxnas_mlflow.supernet import PlainNetwork, function_teacher, network_teacher, plain_logits, subnet_weights
from tests.supernets import MINI_SPACE

pytestmark = pytest.mark.train

OURS, ITS = Normalization((0.3,), (0.4,)), Normalization((0.5,), (0.25,))


def batch(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(OURS(pixels)).permute(0, 3, 1, 2)


def test_a_network_answers_as_it_does_on_images_normalised_its_own_way(rng: np.random.Generator) -> None:
    torch.manual_seed(1)
    network = build_network(MINI_SPACE, MINI_SPACE.largest())
    plain = PlainNetwork(network).eval()
    pixels = rng.integers(0, 256, (5, 16, 16, 1), dtype=np.uint8)
    teacher = network_teacher(plain, its=ITS, ours=OURS)
    answer = teacher(batch(pixels))
    logits = torch.from_numpy(plain_logits(network, subnet_weights(plain), ITS(pixels)))
    torch.testing.assert_close(answer, logits.softmax(1), rtol=1e-4, atol=1e-5)
    # Wherever a training computes: a device without values stands for a GPU.
    assert teacher(batch(pixels).to("meta")).device.type == "meta"


def test_a_function_is_shown_the_pixels_and_may_give_probabilities_only(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (5, 12, 12, 1), dtype=np.uint8)
    shown: list[NDArray[np.uint8]] = []
    given = rng.dirichlet(np.ones(10), 5)

    def answer(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        shown.append(images)
        return given

    teacher = function_teacher(answer, ours=OURS, image_size=None, n_classes=10)
    torch.testing.assert_close(teacher(batch(pixels)).double(), torch.from_numpy(given), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(shown[0], pixels)
    function_teacher(answer, ours=OURS, image_size=24, n_classes=10)(batch(pixels))
    assert shown[1].shape == (5, 24, 24, 1)
    with pytest.raises(InvalidInputError, match=r"each of the 7 classes.*shape \(5, 10\)"):
        function_teacher(answer, ours=OURS, image_size=None, n_classes=7)(batch(pixels))
    with pytest.raises(InvalidInputError, match="end the model with a softmax"):
        function_teacher(lambda _: 9 * given - 3, ours=OURS, image_size=None, n_classes=10)(batch(pixels))
