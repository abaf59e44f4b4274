from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from foxnas_mlflow.core.errors import InvalidFormatError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE, SearchSpace
from foxnas_mlflow.supernet import Supernet, get_preset, subnet_weights, time_forward
from foxnas_mlflow.supernet._style import _relu6
from foxnas_mlflow.tflite._graph import lower
from foxnas_mlflow.tflite._reference import reference_forward
from foxnas_mlflow.tflite._weights import fold_weights, weight_shapes

SPACES = {
    "cpu": CPU_SPACE.replace(image_sizes=(64, 96), width_mult=0.5, n_classes=7),
    "cpu-grey": get_preset("tiny").space(CPU_SPACE, in_channels=1, n_classes=10),
    "tpu": TPU_SPACE.replace(image_sizes=(64, 97), width_mult=0.35, n_classes=7),
}


def noisy(space: SearchSpace, seed: int = 0) -> Supernet:
    """A supernet with parameters and statistics that are all different from their first values.

    In double precision: ReLU6 makes deep random networks amplify rounding.
    """
    generator = torch.manual_seed(seed)
    supernet = Supernet(space)
    with torch.no_grad():
        for name, tensor in supernet.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.7 + 0.6 * torch.rand(tensor.shape, generator=generator))
            else:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return supernet.double()


def images_for(space: SearchSpace, size: int, n: int = 3) -> torch.Tensor:
    return torch.randn(
        n, space.in_channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("training", [False, True])
def test_extract_gives_the_same_outputs(name: str, training: bool) -> None:
    space = SPACES[name]
    supernet = noisy(space).train(training)
    rng = np.random.default_rng(0)
    for architecture in (space.largest(), space.smallest(), *space.sample(rng, n=4)):
        images = images_for(space, architecture.image_size)
        supernet.set_subnet(architecture)
        plain = supernet.extract(architecture)
        assert plain.training == training
        torch.testing.assert_close(plain(images), supernet(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SPACES)
def test_extracted_weights_fit_the_description_and_the_oracle_agrees(name: str) -> None:
    space = SPACES[name]
    supernet = noisy(space).eval()
    architecture = space.sample(np.random.default_rng(5))
    plain = supernet.extract(architecture)
    weights = subnet_weights(plain)
    operators = lower(build_network(space, architecture))
    assert {n: w.shape for n, w in weights.items()} == weight_shapes(operators)
    images = images_for(space, architecture.image_size, n=2)
    outputs = reference_forward(operators, fold_weights(operators, weights), images.numpy().transpose(0, 2, 3, 1))
    logits = next(
        output for output in reversed(outputs.values()) if output.reshape(2, -1).shape[1] == space.n_classes
    ).reshape(2, -1)
    expected = plain(images).detach().numpy()
    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()


def test_kernel_maps_begin_as_the_centre_of_the_large_kernel() -> None:
    space = SPACES["cpu"]
    supernet = Supernet(space)
    large = supernet.extract(space.uniform(64, depth=2, expansion=6, kernel=7))
    small = supernet.extract(space.uniform(64, depth=2, expansion=6, kernel=3))
    name = "stage1.block0.depthwise"
    torch.testing.assert_close(
        small.get_submodule(name).weight, large.get_submodule(name).weight[:, :, 2:5, 2:5], rtol=0, atol=0
    )


@pytest.mark.parametrize("name", SPACES)
def test_sorting_channels_keeps_the_largest_network_and_orders_importance(name: str) -> None:
    space = SPACES[name]
    supernet = noisy(space).eval()
    images = images_for(space, space.image_sizes[-1])
    before = supernet(images)
    supernet.sort_channels()
    torch.testing.assert_close(supernet(images), before, rtol=1e-9, atol=1e-9)
    importance = supernet.get_submodule("stage2.block1.project").weight.abs().sum(dim=(0, 2, 3))
    assert (importance.diff() <= 1e-6).all()


def test_weights_travel_as_numpy_and_another_space_is_refused() -> None:
    space = SPACES["cpu-grey"]
    supernet = noisy(space).eval()
    again = Supernet.from_weights(space, supernet.numpy_weights())
    images = images_for(space, 28)
    torch.testing.assert_close(again.double()(images), supernet(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(InvalidFormatError, match="same space"):
        Supernet.from_weights(space.replace(n_classes=9), supernet.numpy_weights())


def test_timing_takes_the_runs_that_were_asked_or_those_that_fit() -> None:
    space = SPACES["cpu-grey"]
    network = build_network(space, space.smallest())
    samples = time_forward(network, batch=2, device="cpu", runs=5, warmup_seconds=0)
    assert len(samples) == 5
    assert min(samples) > 0
    assert len(time_forward(network, batch=1, device="cpu", runs=100, warmup_seconds=0, max_seconds=0)) == 20


def test_relu6_has_the_values_and_gradients_of_pytorchs() -> None:
    values = torch.tensor([-1.0, 0.0, 1e-6, 3.0, 6.0, 7.0])
    results = []
    for function in (_relu6, F.relu6):
        leaf = values.clone().requires_grad_()
        y = function(leaf * 1)
        (gradient,) = torch.autograd.grad((y * y).sum() + y.sum(), leaf)
        results.append((y.detach(), gradient))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_an_alias_has_the_weights_and_gradients_of_its_own() -> None:
    space = SPACES["cpu-grey"]
    supernet = noisy(space)
    alias = supernet.alias()
    images = images_for(space, 16)
    with torch.no_grad():
        next(supernet.parameters()).mul_(2)
    torch.testing.assert_close(alias(images), supernet(images), rtol=0, atol=0)
    alias.set_subnet(space.smallest(16))
    assert supernet.architecture != alias.architecture
    alias(images).sum().backward()
    assert all(p.grad is None for p in supernet.parameters())
    assert next(alias.parameters()).grad is not None
