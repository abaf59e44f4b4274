"""Spaces, architectures and networks."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import yaml

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidArchitectureError, InvalidFormatError, InvalidSpaceError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE, SearchSpace, get_space

SPACES = [CPU_SPACE, TPU_SPACE]


def test_cardinalities_of_the_paper() -> None:
    assert CPU_SPACE.n_architectures == 22608**5 * 7
    assert TPU_SPACE.n_architectures == 351**5 * 7
    assert f"{CPU_SPACE.n_architectures:.1e}" == "4.1e+22"
    assert f"{TPU_SPACE.n_architectures:.1e}" == "3.7e+13"


def test_tpu_operator_counts_match_the_authors_compiler_log() -> None:
    network = build_network(TPU_SPACE, TPU_SPACE.uniform(192, depth=3, expansion=4, kernel=3))
    counts = Counter(layer.op for layer in network.layers)
    assert counts == {"conv": 34, "depthwise": 8, "add": 10, "pool": 1, "linear": 1}


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_samples_belong_and_survive_json(space: SearchSpace, rng: np.random.Generator) -> None:
    for architecture in space.sample(rng, n=50):
        assert space.validate(architecture) is architecture
        again = Architecture.from_json(architecture.to_json())
        assert again == architecture
        assert hash(again) == hash(architecture)


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
def test_layers_connect_at_every_image_size(space: SearchSpace, rng: np.random.Generator) -> None:
    for size in space.image_sizes:
        network = build_network(space, space.sample(rng, image_size=size))
        channels, pixels = space.in_channels, size
        for layer in network.layers:
            assert (layer.in_channels, layer.in_size) == (channels, pixels), layer.name
            if layer.stride == 2:
                assert layer.out_size == -(-layer.in_size // 2)
            channels, pixels = layer.out_channels, layer.out_size
        assert channels == space.n_classes


def _parameters(architecture: Architecture) -> list[object]:
    out: list[object] = [architecture.image_size]
    for stage in architecture.stages:
        out += [stage.depth, *(b for b in stage.blocks)]
    return out


def test_neighbours_are_unique_and_differ_in_one_parameter(rng: np.random.Generator) -> None:
    architecture = CPU_SPACE.sample(rng, image_size=192)
    neighbours = list(CPU_SPACE.neighbours(architecture))
    assert len(set(neighbours)) == len(neighbours)
    blocks = sum(architecture.depths)
    depth_moves = sum(len({d - 1, d + 1} & {2, 3, 4}) for d in architecture.depths)
    assert len(neighbours) == 6 + depth_moves + blocks * (3 + 2)
    for other in neighbours:
        CPU_SPACE.validate(other)
        if other.depths == architecture.depths:
            changed = [a != b for a, b in zip(_parameters(architecture), _parameters(other), strict=True)]
            assert sum(changed) == 1


def test_architectures_are_immutable_and_checked() -> None:
    architecture = CPU_SPACE.largest()
    with pytest.raises(dataclasses.FrozenInstanceError):
        architecture.image_size = 3  # type: ignore[misc]
    data = architecture.to_dict()
    with pytest.raises(InvalidFormatError, match="format 1; received 2"):
        Architecture.from_dict({**data, "format": 2})
    with pytest.raises(InvalidFormatError, match="also"):
        Architecture.from_dict({**data, "extra": 1})
    with pytest.raises(InvalidFormatError, match="JSON"):
        Architecture.from_json("{")
    with pytest.raises(InvalidArchitectureError, match="expansion"):
        CPU_SPACE.architecture(192, [[(5, 3)] * 2] * 5)
    with pytest.raises(InvalidArchitectureError, match="image_size"):
        CPU_SPACE.architecture(200, [[(4, 3)] * 2] * 5)


def test_yaml_spaces(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    data = TPU_SPACE.replace(name="mine", n_classes=10, in_channels=1, width_mult=0.5).to_dict()
    path.write_text(yaml.safe_dump(data))
    space = get_space(str(path))
    assert space == SearchSpace.from_dict(data)
    assert space.channels(32) == 16
    path.write_text(yaml.safe_dump({**data, "colour": "red"}))
    with pytest.raises(InvalidSpaceError, match="colour"):
        get_space(str(path))
    path.write_text(yaml.safe_dump({**data, "image_sizes": [16]}))
    with pytest.raises(InvalidSpaceError, match="product of the strides"):
        get_space(str(path))
    stages = [{**stage, "stride": float(stage["stride"])} for stage in data["stages"]]
    for change in ({"stages": stages}, {"stem_stride": 2.0}, {"first_stride": True}):
        path.write_text(yaml.safe_dump({**data, **change}))
        with pytest.raises(InvalidSpaceError, match=r"stride must be the integer 1 or 2; received (2\.0|True)"):
            get_space(str(path))
    with pytest.raises(InvalidSpaceError, match="must be one of"):
        get_space("nope")
