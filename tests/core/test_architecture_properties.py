"""Properties of architectures and spaces over generated values."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from foxnas_mlflow.core.architecture import Architecture, Block, Stage
from foxnas_mlflow.core.cost import layer_terms, network_cost
from foxnas_mlflow.core.errors import FoxNasError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE, SearchSpace

BLOCKS = st.builds(Block, st.integers(1, 64), st.integers(0, 8).map(lambda i: 2 * i + 1))
ARCHITECTURES = st.builds(
    Architecture,
    st.text(min_size=1, max_size=20),
    st.integers(1, 4096),
    st.lists(st.builds(Stage, st.integers(1, 999), st.lists(BLOCKS, min_size=1, max_size=5)), min_size=1, max_size=6),
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(ARCHITECTURES)
def test_json_round_trip(architecture: Architecture) -> None:
    for indent in (None, 2):
        again = Architecture.from_json(architecture.to_json(indent=indent))
        assert again == architecture
        assert hash(again) == hash(architecture)
    assert "\n" not in architecture.to_json()


@given(st.sampled_from(["format", "space", "image_size", "stages"]), JSON_VALUES)
def test_a_damaged_architecture_is_refused_in_our_words(key: str, value: object) -> None:
    data = {**CPU_SPACE.largest(192).to_dict(), key: value}
    try:
        architecture = Architecture.from_json(json.dumps(data))
    except FoxNasError:
        return
    assert architecture.to_dict() == {**data, "format": 1}
    assert key in ("format", "space", "image_size")


@given(JSON_VALUES)
def test_foreign_json_is_refused_in_our_words(value: object) -> None:
    with pytest.raises(FoxNasError):
        Architecture.from_json(json.dumps(value))


@pytest.mark.parametrize("space", [CPU_SPACE, TPU_SPACE], ids=lambda s: s.name)
def test_the_spaces_survive_yaml(space: SearchSpace) -> None:
    assert SearchSpace.from_dict(yaml.safe_load(yaml.safe_dump(space.to_dict()))) == space


@given(st.sampled_from(sorted(TPU_SPACE.to_dict())), JSON_VALUES)
def test_bad_space_values_are_refused_in_our_words(key: str, value: object) -> None:
    data = {**TPU_SPACE.to_dict(), key: value}
    try:
        space = SearchSpace.from_dict(data)
    except FoxNasError:
        return
    assert SearchSpace.from_dict(space.to_dict()) == space


def test_a_depth_neighbour_adds_or_drops_one_block(rng: np.random.Generator) -> None:
    for architecture in CPU_SPACE.sample(rng, n=20, image_size=192):
        for other in CPU_SPACE.neighbours(architecture):
            if other.depths != architecture.depths:
                changed = [
                    (a.blocks, b.blocks) for a, b in zip(architecture.stages, other.stages, strict=True) if a != b
                ]
                assert len(changed) == 1
                short, long = sorted(changed[0], key=len)
                assert len(long) == len(short) + 1
                assert long[: len(short)] == short
                assert other.image_size == architecture.image_size


def test_every_architecture_costs_more_at_a_larger_size(rng: np.random.Generator) -> None:
    for architecture in CPU_SPACE.sample(rng, n=3):
        costs = []
        for size in CPU_SPACE.image_sizes:
            resized = Architecture(CPU_SPACE.name, size, architecture.stages)
            network = build_network(CPU_SPACE, resized)
            costs.append(network_cost(network))
            np.testing.assert_allclose(
                np.sum([layer_terms(layer) for layer in network.layers], axis=0), list(costs[-1].terms.values())
            )
        assert len(costs) == 7
        assert len({cost.params for cost in costs}) == 1
        for small, large in itertools.pairwise(costs):
            assert small.macs < large.macs
            assert small.peak_activation_bytes < large.peak_activation_bytes
