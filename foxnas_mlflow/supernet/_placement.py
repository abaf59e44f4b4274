"""Known weights inside a supernet: kernels in the centre, channels in a prefix, missing blocks as identities.

What is new beside the known channels must not change what they compute, and must learn: a known output
channel reads new input channels with weights of zero, and everything else that is new is initialised as
in any supernet. So the known network's outputs stay, and gradients reach every new weight at once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.supernet._network import Supernet
from foxnas_mlflow.supernet._source import Source, layer_of

_REMEDY = (
    "give the space and preset whose blocks the weights have: space=cpu for MobileNetV3-Large, "
    "space=lite for EfficientNet-Lite0, space=proxyless for ProxylessNAS, a YAML of one's own for others"
)
_CLASSIFIER = "head.classifier"


@dataclass(frozen=True)
class Placement:
    """What was put where.

    Attributes:
        placed: Names of the supernet's tensors that hold known values, whole or in part.
        new: Names of those that hold none.
        differences: What keeps the subnet from computing what the source computed.
    """

    placed: tuple[str, ...]
    new: tuple[str, ...]
    differences: tuple[str, ...]


def place(source: Source, supernet: Supernet, *, new_classifier: bool = False) -> Placement:
    """Put known weights into a supernet.

    Args:
        source: The weights.
        supernet: Takes them; newly made.
        new_classifier: Begin with a new classifier though the number of classes is the same.

    Raises:
        InvalidInputError: If a layer has no counterpart; it is named, and the supernet stays as it was.
    """
    _check(source, supernet)
    state = {name: t.clone() for name, t in supernet.state_dict().items()}
    n_classes = source.tensors[f"{_CLASSIFIER}.weight"].shape[0] if f"{_CLASSIFIER}.weight" in source.tensors else 0
    dropped = new_classifier or n_classes != supernet.space.n_classes
    placed, new = [], []
    for name, target in state.items():
        known = None if dropped and layer_of(name) == _CLASSIFIER else _value(name, source, target)
        if known is None:
            new.append(name)
        else:
            _put(target, known)
            placed.append(name)
    supernet.load_state_dict(state)
    supernet.style = source.style.at(1.0)
    return Placement(tuple(placed), tuple(new), _differences(source, supernet, n_classes, dropped))


def same_shape(source: Source, space: SearchSpace) -> Architecture | None:
    """The smallest subnet that holds the source's network whole, at the largest image size; None if none does."""
    stages = []
    for j in range(1, space.n_stages + 1):
        depth = next((d for d in space.depths if d >= source.depth(j)), None)
        if depth is None:
            return None
        blocks = [_block(source, space, f"stage{j}.block{i}") for i in range(depth)]
        stages.append(blocks)
    if any(block is None for blocks in stages for block in blocks):
        return None
    architecture = space.architecture(space.image_sizes[-1], [[b for b in blocks if b] for blocks in stages])
    for layer in build_network(space, architecture).layers:
        weight = source.tensors.get(f"{layer.name}.weight")
        if weight is not None and layer.name != _CLASSIFIER and len(weight) > layer.out_channels:
            return None
    return architecture


def _block(source: Source, space: SearchSpace, name: str) -> tuple[int, int] | None:
    """Smallest expansion ratio and kernel that hold a block; the smallest of all for one that is new."""
    dense, wide = (source.tensors.get(f"{name}.{layer}.weight") for layer in ("expand", "depthwise"))
    if dense is None:
        return space.expansions[0], space.kernels[0]
    hidden, k = dense.shape[0], (dense if wide is None else wide).shape[-1]
    # By the real channels of the space: a ratio of 2.3 fits into one of 3.
    ratios = [e for e, channels in _hidden_channels(space)[name] if hidden <= channels]
    kernels = [candidate for candidate in space.kernels if candidate >= k]
    return (ratios[0], kernels[0]) if ratios and kernels else None


@functools.cache
def _hidden_channels(space: SearchSpace) -> dict[str, list[tuple[int, int]]]:
    """Expansion ratios and the channels that they give, by block."""
    found: dict[str, list[tuple[int, int]]] = {}
    for e in space.expansions:
        whole = space.uniform(space.image_sizes[-1], depth=space.max_depth, expansion=e, kernel=space.kernels[-1])
        for layer in build_network(space, whole).layers:
            if layer.name.endswith(".expand"):
                found.setdefault(layer.name.removesuffix(".expand"), []).append((e, layer.out_channels))
    return found


def _check(source: Source, supernet: Supernet) -> None:
    """Refuse a source whose layers are not ours, naming the first that differs."""
    ours = list(dict.fromkeys(layer_of(name) for name in supernet.state_dict()))
    theirs = source.layers
    known_blocks = {layer.rpartition(".")[0] for layer in theirs}
    known_stages = {layer.split(".")[0] for layer in theirs}
    for layer in ours:
        block, stage = layer.rpartition(".")[0], layer.split(".")[0]
        identity = stage.startswith("stage") and stage in known_stages and block not in known_blocks
        if layer not in theirs and not identity and layer != _CLASSIFIER:
            raise InvalidInputError(
                f"init must have the blocks of the space {supernet.space.name!r}: first to differ is {layer}",
                received=f"{source.family} without it",
                remedy=_REMEDY,
            )
    our_blocks, our_stages = {layer.rpartition(".")[0] for layer in ours}, {layer.split(".")[0] for layer in ours}
    for layer in theirs:
        block, stage = layer.rpartition(".")[0], layer.split(".")[0]
        deeper = stage.startswith("stage") and stage in our_stages and block not in our_blocks
        if layer not in ours and not deeper:
            raise InvalidInputError(
                f"init must have the blocks of the space {supernet.space.name!r}: first to differ is {layer}",
                received=f"{source.family}, which has it",
                remedy=_REMEDY,
            )
    for name, tensor in supernet.state_dict().items():
        value = source.tensors.get(name)
        if value is not None and value.ndim != tensor.ndim:
            raise InvalidInputError(
                f"init must have the blocks of the space {supernet.space.name!r}: first to differ is {layer_of(name)}",
                received=f"{name} of shape {tuple(value.shape)}",
                remedy=_REMEDY,
            )


def _value(name: str, source: Source, target: Tensor) -> Tensor | None:
    """A source's tensor with the kernel size and the input channels that ours has, or None."""
    value = source.tensors.get(name)
    layer, _, parameter = name.rpartition(".")
    if value is None:
        # Ours has more kernel sizes: its map to a smaller one begins as a crop.
        return None
    if parameter.startswith("to"):
        return value if value.shape == target.shape else None
    if value.ndim == 4 and value.shape[-1] != target.shape[-1]:
        value = _kernel(value, target.shape[-1], layer, source.tensors)
    if name == "stem.conv.weight" and value.shape[1] != target.shape[1]:
        # A grey image is a colour image with three equal channels.
        value = value.sum(1, keepdim=True) if target.shape[1] == 1 else value.expand(-1, 3, -1, -1) / 3
    return value


def _kernel(weight: Tensor, k: int, layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """A kernel at another size: in the centre of a larger one, or the source's own smaller one."""
    missing = (k - weight.shape[-1]) // 2
    if missing > 0:
        return torch.nn.functional.pad(weight, (missing,) * 4)
    while weight.shape[-1] > k:
        centre = weight[:, :, 1:-1, 1:-1]
        matrix = tensors.get(f"{layer}.to{centre.shape[-1]}")
        weight = centre if matrix is None else (centre.flatten(2) @ matrix.t()).reshape(centre.shape)
    return weight


def _put(target: Tensor, known: Tensor) -> None:
    """Copy the common prefix; known outputs read nothing from inputs that are new."""
    n_out = min(len(target), len(known))
    if target.ndim == 1:
        target[:n_out] = known[:n_out]
        return
    n_in = min(target.shape[1], known.shape[1])
    target[:n_out, n_in:] = 0
    target[:n_out, :n_in] = known[:n_out, :n_in]


def _differences(source: Source, supernet: Supernet, n_classes: int, dropped: bool) -> tuple[str, ...]:
    space = supernet.space
    lines = list(source.differences)
    ours = supernet.state_dict()
    narrower = [
        name
        for name, value in source.tensors.items()
        if name in ours and layer_of(name) != _CLASSIFIER and value.ndim > 1 and len(value) > len(ours[name])
    ]
    if narrower:
        first = narrower[0]
        lines.append(
            f"narrower than there: {layer_of(first)} has the first {len(ours[first])} of "
            f"{len(source.tensors[first])} channels, so accuracy returns with training only"
        )
    strides = (space.stem_stride, space.first_stride, *(stage.stride for stage in space.stages))
    if source.strides and source.strides != strides:
        lines.append(f"strides of stem, first block and stages are {strides}, there {source.strides}")
    if source.style.symmetric:
        lines.append("stride 2 pads as TensorFlow does, one pixel from there, from the first step of training on")
    if source.style.activations:
        lines.append("ReLU6 everywhere, there ReLU and h-swish: changed step by step at the beginning of training")
    deepest = max(source.depth(j) for j in range(1, space.n_stages + 1))
    if deepest < space.max_depth:
        lines.append(f"blocks beyond depth {deepest} begin as identities")
    elif deepest > space.max_depth:
        lines.append(f"stages have at most {space.max_depth} blocks, there {deepest}: the last ones are left out")
    if space.in_channels == 1 and source.tensors["stem.conv.weight"].shape[1] == 3:
        lines.append("one input channel: the stem's three are summed")
    if dropped:
        lines.append(f"a new classifier for {space.n_classes} classes" + (f", there {n_classes}" if n_classes else ""))
    return tuple(lines)
