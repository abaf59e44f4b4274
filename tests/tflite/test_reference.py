"""The NumPy reference and the folding, held against plain PyTorch layers with batch norm unfolded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from foxnas_mlflow.core.errors import ConversionError
from foxnas_mlflow.core.network import Network
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.tflite import fold_weights, lower, random_weights, reference_forward, weight_shapes

from .conftest import SMALL_CPU, SMALL_TPU, sample_network


def torch_forward(network: Network, weights: Mapping[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The layer description run literally: no folding, the hard sigmoid as it is written."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    w = {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in weights.items()}

    def conv(layer, x, groups):
        total = max((layer.out_size - 1) * layer.stride + layer.kernel - layer.in_size, 0)
        x = functional.pad(x, (total // 2, total - total // 2) * 2)
        x = functional.conv2d(x, w[f"{layer.name}.weight"], w.get(f"{layer.name}.bias"), layer.stride, groups=groups)
        if layer.norm:
            gain, shift, mean, var = (w[f"{layer.name}.norm.{part}"] for part in ("weight", "bias", "mean", "var"))
            x = functional.batch_norm(x, mean, var, gain, shift, eps=1e-5)
        return functional.relu6(x) if layer.activation == "relu6" else x

    x = torch.from_numpy(images.astype(np.float64)).permute(0, 3, 1, 2)
    for unit in network.units:
        entry = x
        for layer in unit.layers:
            if layer.op in ("conv", "depthwise"):
                x = conv(layer, x, layer.in_channels if layer.op == "depthwise" else 1)
            elif layer.op == "se":
                name = layer.name
                gate = x.mean((2, 3), keepdim=True)
                gate = functional.relu(functional.conv2d(gate, w[f"{name}.reduce.weight"], w[f"{name}.reduce.bias"]))
                gate = functional.conv2d(gate, w[f"{name}.expand.weight"], w[f"{name}.expand.bias"])
                x = x * functional.relu6(gate + 3) / 6
            elif layer.op == "add":
                x = x + entry
            elif layer.op == "pool":
                x = x.mean((2, 3), keepdim=True)
            else:
                x = functional.linear(x.flatten(1), w[f"{layer.name}.weight"], w[f"{layer.name}.bias"])
    return x.numpy()


@pytest.mark.train
@pytest.mark.parametrize(
    ("space", "image_size"),
    [
        (SMALL_CPU, 48),
        (SMALL_TPU.replace(width_mult=0.25), 32),
        (SMALL_CPU.replace(in_channels=1, width_mult=0.25, image_sizes=(37,)), 37),
    ],
)
def test_reference_equals_plain_layers_with_norm(space: SearchSpace, image_size: int, rng: np.random.Generator) -> None:
    network = sample_network(space, image_size)
    weights = random_weights(network, rng)
    images = rng.normal(size=(2, image_size, image_size, space.in_channels)).astype(np.float32)
    operators = lower(network)
    ours = reference_forward(operators, fold_weights(operators, weights), images)[operators[-1].name]
    expected = torch_forward(network, weights, images)
    assert expected.std() > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("stem.conv.weight"), "no 'stem.conv.weight'"),
        (lambda w: w.update(extra=np.zeros(1)), "only arrays of this network"),
        (lambda w: w.update({"stem.conv.weight": np.zeros((1, 2, 3, 4))}), "must have the shape"),
        (lambda w: w["stem.conv.weight"].fill(np.nan), "must be finite"),
        (lambda w: w["stem.conv.norm.var"].fill(-1), "must not be negative"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message: str, rng: np.random.Generator) -> None:
    network = sample_network(SMALL_CPU, 32)
    weights = random_weights(network, rng)
    change(weights)
    with pytest.raises(ConversionError, match=message):
        fold_weights(lower(network), weights)


def test_weight_names_are_those_of_the_layers(rng: np.random.Generator) -> None:
    network = sample_network(SMALL_CPU, 32)
    names = {name.rsplit(".", 1)[0].removesuffix(".norm") for name in weight_shapes(lower(network))}
    layers = {layer.name for layer in network.layers if layer.op in ("conv", "depthwise", "linear")}
    gates = {f"{layer.name}.{part}" for layer in network.layers if layer.op == "se" for part in ("reduce", "expand")}
    assert names == layers | gates
