"""Known weights under the names of our layers, whoever trained them.

| source                         | read by              | what else is known of it               |
|--------------------------------|----------------------|----------------------------------------|
| a supernet of ours             | `of_supernet`        | its space                              |
| once-for-all's supernets       | `_once_for_all`      | activations, padding                   |
| timm's, torchvision's networks | `_published`         | activations, padding, strides          |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.supernet._network import torch_name
from foxnas_mlflow.supernet._style import OURS, Style


@dataclass(frozen=True)
class Source:
    """Weights to begin with.

    Attributes:
        family: What they are of, for people.
        tensors: By the names of our layers, of the largest network that they hold.
        style: Activations and padding that they were trained with.
        elastic: Whether smaller networks are their prefixes too.
        strides: Of stem, first block and stages; empty if unknown.
        differences: What else differs from our networks.
    """

    family: str
    tensors: Mapping[str, Tensor]
    style: Style = OURS
    elastic: bool = False
    strides: tuple[int, ...] = ()
    differences: tuple[str, ...] = field(default=())

    @property
    def layers(self) -> list[str]:
        """Names of the layers in order; a squeeze-excite gate is one layer."""
        return list(dict.fromkeys(layer_of(name) for name in self.tensors))

    def depth(self, stage: int) -> int:
        """Blocks of a stage, counted from 1."""
        blocks = {name.split(".")[1] for name in self.tensors if name.startswith(f"stage{stage}.")}
        return len(blocks)


def of_supernet(space: SearchSpace, weights: Mapping[str, NDArray[Any]]) -> Source:
    """The weights of a supernet of ours."""
    tensors = {torch_name(name): torch.tensor(np.asarray(v), dtype=torch.float32) for name, v in weights.items()}
    strides = (space.stem_stride, space.first_stride, *(stage.stride for stage in space.stages))
    return Source(f"a supernet of the space {space.name}", tensors, elastic=True, strides=strides)


def layer_of(name: str) -> str:
    """The layer that a tensor of our names belongs to."""
    layer = name.rpartition(".")[0].removesuffix(".norm")
    gate, _, part = layer.rpartition(".")
    return gate if gate.endswith(".se") and part in ("reduce", "expand") else layer
