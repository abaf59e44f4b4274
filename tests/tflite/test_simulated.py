"""Training with simulated int8: the file computes what was trained, and loses less than before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from foxnas_mlflow.core.network import build_network  # noqa: E402
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE  # noqa: E402
from foxnas_mlflow.runtime import open_interpreter  # noqa: E402
from foxnas_mlflow.supernet import SimulatedNetwork  # noqa: E402
from foxnas_mlflow.supernet._simulated import steps_of  # noqa: E402
from foxnas_mlflow.tflite import (  # noqa: E402
    Conversion,
    Int8Model,
    convert,
    grids_of,
    lower,
    one_scale_of,
    random_weights,
    read_tflite,
    with_weights,
)
from foxnas_mlflow.tflite._checks import body_operators  # noqa: E402
from foxnas_mlflow.tflite._int8 import dequantize  # noqa: E402
from tests.supernets import MINI_SPACE  # noqa: E402

from .conftest import NORMALIZATION, sample_images  # noqa: E402

pytestmark = [pytest.mark.tflite, pytest.mark.train]

# A stage without and one with a gate, residual blocks in both: all operators, seconds to convert.
SPACE = MINI_SPACE.replace(name="two", stages=MINI_SPACE.stages[:2], in_channels=3)
NETWORK = build_network(SPACE, SPACE.uniform(16, depth=2, expansion=3, kernel=5))
IMAGES = sample_images(16, 16)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights(NETWORK, np.random.default_rng(0))


@pytest.fixture(scope="module")
def conversion(weights: dict[str, np.ndarray]) -> Conversion:
    """A file whose classifier has one scale, all other weights one a channel."""
    return convert(NETWORK, weights, IMAGES, normalization=NORMALIZATION, runtime="edgetpu")


def simulated(conversion: Conversion, weights: dict[str, np.ndarray]) -> SimulatedNetwork:
    file = read_tflite(conversion.data)
    return SimulatedNetwork(NETWORK, weights, grids_of(file, NETWORK), one_scale=one_scale_of(file, NETWORK))


@pytest.mark.parametrize("space", [CPU_SPACE, TPU_SPACE, MINI_SPACE])
def test_its_operators_are_those_of_the_file(space: Any) -> None:
    rng = np.random.default_rng(0)
    for architecture in space.sample(rng, n=3):
        network = build_network(space, architecture)
        steps = steps_of(network)
        assert [(s.name, s.inputs) for s in steps] == [(o.name, o.inputs) for o in lower(network)]


def levels_apart(network: SimulatedNetwork, data: bytes) -> dict[str, int]:
    """Largest difference, in levels, of each operator's output, both given the file's own inputs."""
    model = read_tflite(data)
    interpreter = open_interpreter(data, preserve_all=True)
    apart: dict[str, int] = {}
    for image in Int8Model(data).quantize(IMAGES):
        interpreter.set_tensor(model.inputs[0], image[None])
        interpreter.invoke()
        seen = {"input": torch.from_numpy(dequantize(image[None], model.input)).permute(0, 3, 1, 2)}
        for step, entry in zip(network.steps, body_operators(model), strict=True):
            raw, tensor = interpreter.get_tensor(entry.outputs[0]), model.tensors[entry.outputs[0]]
            with torch.no_grad():
                y = network.compute(step, [seen[name] for name in step.inputs])
            y = y.permute(0, 2, 3, 1) if y.dim() == 4 else y
            ours = np.rint(y.numpy() / tensor.scale[0]).astype(int) + tensor.zero_point[0]
            difference = int(np.abs(ours.reshape(raw.shape) - raw.astype(int)).max())
            apart[step.name] = max(apart.get(step.name, 0), difference)
            values = torch.from_numpy(dequantize(raw, tensor))
            seen[step.name] = values.permute(0, 3, 1, 2) if values.dim() == 4 else values
    return apart


def test_every_operator_of_the_file_is_within_one_level_of_what_was_trained(
    conversion: Conversion, weights: dict[str, np.ndarray]
) -> None:
    # Other weights than those whose ranges made the grids: what training leaves.
    rng = np.random.default_rng(1)
    moved = {
        name: (values * rng.uniform(0.8, 1.2, values.shape)).astype(np.float32) for name, values in weights.items()
    }
    network = simulated(conversion, moved).eval()
    other = with_weights(conversion, NETWORK, network.parameters_of_file(), "moved")
    assert read_tflite(other.data).structure == read_tflite(conversion.data).structure
    assert other.size_bytes <= conversion.size_bytes + 200
    assert other.sha256 != conversion.sha256
    assert read_tflite(other.data).metadata["repaired"] == "moved"
    assert max(levels_apart(network, other.data).values()) <= 1
    with torch.no_grad():
        trained = network(torch.from_numpy(NORMALIZATION(IMAGES)).permute(0, 3, 1, 2)).numpy()
    # A level here and there, on the way through all of them.
    levels = np.rint((Int8Model(other.data).logits(IMAGES) - trained) / read_tflite(other.data).output.scale[0])
    assert np.abs(levels).max() <= 3
    assert np.abs(levels).mean() < 0.1


def test_gradients_pass_the_rounding(conversion: Conversion, weights: dict[str, np.ndarray]) -> None:
    network = simulated(conversion, weights).train()
    network(torch.from_numpy(NORMALIZATION(IMAGES)).permute(0, 3, 1, 2)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    assert sum(int(p.grad.abs().sum() > 0) for p in network.parameters()) > 0.9 * len(list(network.parameters()))  # type: ignore[union-attr]
