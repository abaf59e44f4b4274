"""Weights of once-for-all's supernets (Cai et al., 2020) as a beginning for ours.

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

What stays different is in `differences`: it is why a training has to follow.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.network import NORM_EPSILON
from foxnas_mlflow.supernet._network import Supernet

_PROXYLESS_EPSILON = 1e-3

_BLOCK = {
    "expand": "inverted_bottleneck",
    "depthwise": "depth_conv",
    "project": "point_linear",
    "se": "depth_conv.se.fc",
}

_REMEDY = (
    "give the checkpoint's space and width: space=cpu width_mult=1.0 or 1.2 for MobileNetV3, "
    "space=proxyless width_mult=1.3 for ProxylessNAS, with preset=paper"
)


@dataclass(frozen=True, slots=True)
class Initialization:
    """What was read from a once-for-all checkpoint.

    Attributes:
        family: ``MobileNetV3`` or ``ProxylessNAS``.
        n_tensors: Tensors of the supernet that were set.
        differences: What differs from the network that the weights were trained in.
    """

    family: str
    n_tensors: int
    differences: tuple[str, ...]


def load_once_for_all(path: Path, supernet: Supernet) -> Initialization:
    """Set a supernet's weights from a once-for-all checkpoint.

    Args:
        path: A file of `torch.save` with the state dict, or with it under ``state_dict``; only
            tensors are read from it, never code.
        supernet: Takes the weights; its space must have the checkpoint's blocks and widths.

    Raises:
        InvalidInputError: If it cannot be read, or does not fit the space.
    """
    theirs = _read(path)
    proxyless = "final_expand_layer.conv.weight" not in theirs
    ours = supernet.state_dict()
    n_stages = supernet.space.n_stages
    n_blocks = 1 + max((int(m[1]) for m in map(re.compile(r"blocks\.(\d+)\.").match, theirs) if m), default=-1)
    depth, rest = divmod(n_blocks - 1 - proxyless, n_stages)
    if depth < supernet.space.max_depth or rest:
        raise InvalidInputError(
            f"init must hold {n_stages} stages of {supernet.space.max_depth} blocks, as the space has",
            received=f"{max(n_blocks - 1, 0)} blocks",
            remedy=_REMEDY,
        )
    values: dict[str, Tensor] = {}
    new: list[str] = []
    for name, expected in ours.items():
        value = _value(name, theirs, depth, n_blocks - 1, proxyless=proxyless)
        if name == "stem.conv.weight" and value is not None and expected.shape[1] == 1:
            # A grey image is a colour image with three equal channels.
            value = value.sum(1, keepdim=True)
        if name.startswith("head.classifier.") and (value is None or value.shape != expected.shape):
            new.append(name)
        elif value is None or value.shape != expected.shape:
            raise InvalidInputError(
                f"init must fit the space: {name} has the shape {tuple(expected.shape)}",
                received="no such tensor" if value is None else f"shape {tuple(value.shape)}",
                remedy=_REMEDY,
            )
        else:
            values[name] = value
    supernet.load_state_dict({**ours, **values})
    return Initialization(
        "ProxylessNAS" if proxyless else "MobileNetV3", len(values), _differences(supernet, bool(new), proxyless)
    )


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict under names without the wrappers that versions of once-for-all differ in."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Torn and foreign files raise anything.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a file of tensors alone"
        raise InvalidInputError(
            "init must be the path of a once-for-all checkpoint", received=f"{path} ({reason})"
        ) from error
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not all(isinstance(t, Tensor) for t in data.values()):
        raise InvalidInputError("init must hold a state dict of tensors", received=str(path))
    renamed = {}
    for name, tensor in data.items():
        short = str(name).removeprefix("module.").replace(".mobile_inverted_conv.", ".conv.")
        for inner in ("bn", "conv", "linear"):
            short = short.replace(f".{inner}.{inner}.", f".{inner}.")
        renamed[short] = tensor.float()
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


def _differences(supernet: Supernet, new_classifier: bool, proxyless: bool) -> tuple[str, ...]:
    space = supernet.space
    lines = ["stride 2 pads as TensorFlow does, one pixel from once-for-all's"]
    if proxyless:
        lines.append("batch norm adds 1e-5 to variances, there 1e-3 (equal in evaluation, not in training)")
        lines.append("the last block is fixed at kernel 3 and expansion 6")
    else:
        lines.append("ReLU6 everywhere, there ReLU and h-swish: accuracy returns with training only")
    untrained = sorted({*space.expansions} - {3, 4, 6})
    if untrained:
        lines.append(f"expansion ratios {untrained} were not trained there")
    if space.in_channels == 1:
        lines.append("one input channel: the stem's three are summed")
    if new_classifier:
        lines.append(f"a new classifier for {space.n_classes} classes")
    return tuple(lines)
