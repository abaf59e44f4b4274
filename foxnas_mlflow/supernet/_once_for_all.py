"""Weights of once-for-all's supernets (Cai et al., 2020) under our names.

The published state dicts ``ofa_mbv3_d234_e346_k357_w1.0``, ``..._w1.2`` and
``ofa_proxyless_d234_e346_k357_w1.3`` hold the largest network; smaller ones are its prefixes and,
by the maps ``7to5_matrix`` and ``5to3_matrix``, its smaller kernels, exactly as here.

| once-for-all                               | here                                      |
|--------------------------------------------|-------------------------------------------|
| first_conv                                 | stem.conv                                 |
| blocks.0.conv.depth_conv, .point_linear    | first.depthwise, first.project            |
| blocks.{1 + 4 (j - 1) + i}                 | stage{j}.block{i}                         |
| .inverted_bottleneck                       | .expand                                   |
| .depth_conv.conv.7to5_matrix, 5to3_matrix  | .depthwise.to5, .to3                      |
| .depth_conv.se.fc.reduce, .expand          | .se.reduce, .expand                       |
| .point_linear                              | .project                                  |
| final_expand_layer (MobileNetV3)           | tail.conv                                 |
| blocks.21 (ProxylessNAS)                   | tail.block, at kernel 3 and expansion 6   |
| feature_mix_layer                          | head.hidden, or tail.conv (ProxylessNAS)  |
| classifier.linear                          | head.classifier                           |

A published width that is not the space's is placed by prefix, as any source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.network import NORM_EPSILON, build_network
from foxnas_mlflow.core.space import CPU_SPACE, PROXYLESS_SPACE, SearchSpace
from foxnas_mlflow.supernet._network import Supernet
from foxnas_mlflow.supernet._source import Source
from foxnas_mlflow.supernet._style import SourceActivation, Style

_PROXYLESS_EPSILON = 1e-3

_BLOCK = {
    "expand": "inverted_bottleneck",
    "depthwise": "depth_conv",
    "project": "point_linear",
    "se": "depth_conv.se.fc",
}

_MARK = "first_conv.conv.weight"


def is_once_for_all(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a supernet of once-for-all."""
    return _MARK in _renamed(tensors)


def from_once_for_all(tensors: Mapping[str, Tensor]) -> Source:
    """A state dict of once-for-all under our names.

    Raises:
        InvalidInputError: If it has not the blocks of a published supernet.
    """
    theirs = _renamed(tensors)
    proxyless = "final_expand_layer.conv.weight" not in theirs
    skeleton = PROXYLESS_SPACE if proxyless else CPU_SPACE
    n_blocks = 1 + max((int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, theirs) if m), default=-1)
    depth, rest = divmod(n_blocks - 1 - proxyless, skeleton.n_stages)
    if depth < 1 or rest:
        raise InvalidInputError(
            f"init must hold {skeleton.n_stages} stages of as many blocks each, as once-for-all's supernets do",
            received=f"{max(n_blocks - 1, 0)} blocks",
        )
    values = {}
    space = skeleton.replace(depths=(depth,))
    for name in Supernet(space).state_dict():
        value = _value(name, theirs, depth, n_blocks - 1, proxyless=proxyless)
        if value is not None:
            values[name] = value
    strides = (space.stem_stride, space.first_stride, *(stage.stride for stage in space.stages))
    if proxyless:
        differences = (
            "batch norm adds 1e-5 to variances, there 1e-3 (equal in evaluation, not in training)",
            "the last block is fixed at kernel 3 and expansion 6",
        )
        return Source("once-for-all's ProxylessNAS", values, Style(symmetric=True), True, strides, differences)
    style = Style(_activations(space), symmetric=True)
    return Source("once-for-all's MobileNetV3", values, style, True, strides)


def _activations(space: SearchSpace) -> dict[str, SourceActivation]:
    """Theirs: ReLU up to the second stage, h-swish behind it, and in the stem."""
    found: dict[str, SourceActivation] = {}
    for unit in build_network(space, space.largest()).units:
        early = unit.name == "first" or unit.stage in (1, 2)
        found |= {layer.name: "relu" if early else "hswish" for layer in unit.layers if layer.activation == "relu6"}
    return found


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the wrappers that versions of once-for-all differ in."""
    renamed = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("module.").replace(".mobile_inverted_conv.", ".conv.")
        for inner in ("bn", "conv", "linear"):
            short = short.replace(f".{inner}.{inner}.", f".{inner}.")
        renamed[short] = tensor
    return renamed


def _value(name: str, theirs: Mapping[str, Tensor], depth: int, last: int, *, proxyless: bool) -> Tensor | None:
    """The tensor of one of our names, or None."""
    unit, _, parameter = name.rpartition(".")
    if name == "head.hidden.bias":
        weight = theirs.get("feature_mix_layer.conv.weight")
        return None if weight is None else weight.new_zeros(len(weight))
    if unit == "head.classifier":
        return theirs.get(f"classifier.linear.{parameter}")
    norm = unit.endswith(".norm")
    unit = unit.removesuffix(".norm")
    mix, tail = "feature_mix_layer", "feature_mix_layer" if proxyless else "final_expand_layer"
    outside = {"stem.conv": "first_conv", "tail.conv": tail, "head.hidden": mix}
    if unit in outside:
        source = outside[unit]
    else:
        match = re.fullmatch(r"(?:stage(\d+)\.block(\d+)|(first)|(tail)\.block)\.(\w+)(?:\.(\w+))?", unit)
        if match is None:
            return None
        stage, block, first, _, layer, gate = match.groups()
        index = 0 if first else 1 + (int(stage) - 1) * depth + int(block) if stage else last
        source = f"blocks.{index}.conv.{_BLOCK[layer]}"
        if gate:
            return theirs.get(f"{source}.{gate}.{parameter}")
        if parameter.startswith("to"):
            small = int(parameter[2:])
            return theirs.get(f"{source}.conv.{small + 2}to{small}_matrix")
        if layer == "depthwise" and not stage and not norm:
            return _smallest_kernel(theirs, source)
    if not norm:
        return theirs.get(f"{source}.conv.{parameter}")
    value = theirs.get(f"{source}.bn.{parameter}")
    if value is not None and proxyless and parameter == "running_var":
        # Their batch norms add more to variances: the sum is what matters.
        value = value + (_PROXYLESS_EPSILON - NORM_EPSILON)
    return value


def _smallest_kernel(theirs: Mapping[str, Tensor], source: str) -> Tensor | None:
    """The 3x3 kernel of a depthwise convolution that is fixed here and may be elastic there."""
    weight = theirs.get(f"{source}.conv.weight")
    while weight is not None and (k := weight.shape[-1]) > 3:
        matrix = theirs.get(f"{source}.conv.{k}to{k - 2}_matrix")
        if matrix is None:
            return None
        centre = weight[:, :, 1:-1, 1:-1]
        weight = (centre.flatten(2) @ matrix.t()).reshape(centre.shape)
    return weight
