"""The one description of a network, layer by layer.

PyTorch, Keras, the flatbuffer writer, the cost model and the report all build from what
`build_network` returns; none of them knows the block structure by itself.

A network is a list of units (stem, first block, the blocks of the stages, tail, head), a unit is
a list of layers. Convolutions and depthwise convolutions are followed by batch norm (folded into
weights and bias for int8) and the layer's activation. Padding is TensorFlow's SAME:
``out_size = ceil(in_size / stride)``, with ``total = max((out - 1) * stride + k - in, 0)`` pixels,
the smaller half before. Images and feature maps are square.
"""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from foxnas_mlflow.core.architecture import Architecture, Block
from foxnas_mlflow.core.space import BlockType, SearchSpace, make_divisible

Op = Literal["conv", "depthwise", "se", "add", "pool", "linear"]
Activation = Literal["relu6", "none"]
UnitKind = Literal["conv", "separable", "mbconv", "mbconv_se", "fused", "head"]

SE_REDUCTION = 4

NORM_EPSILON = 1e-5
"""Added to variances by every batch norm, in training and when it is folded."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a network.

    Attributes:
        name: Unique in the network, for example ``stage1.block0.expand``.
        op: ``conv`` (dense convolution), ``depthwise``, ``se`` (squeeze-excite: pool, reduce,
            ReLU, expand, hard sigmoid, multiply), ``add`` (residual), ``pool`` (global average),
            ``linear`` (fully connected).
        in_size, out_size: Height and width in pixels before and after.
        in_channels, out_channels: Channels before and after.
        kernel, stride: Of a convolution, else 1.
        activation: Applied after batch norm.
        norm: Whether batch norm follows; layers without it have a bias instead.
        squeeze: Channels between the two layers of a squeeze-excite gate, else 0.
    """

    name: str
    op: Op
    in_size: int
    out_size: int
    in_channels: int
    out_channels: int
    _: KW_ONLY
    kernel: int = 1
    stride: int = 1
    activation: Activation = "none"
    norm: bool = False
    squeeze: int = 0


@dataclass(frozen=True, slots=True)
class Unit:
    """A block of a network.

    Attributes:
        name: ``stem``, ``first``, ``stage{j}.block{i}`` (j from 1, i from 0), ``tail.*``, ``head``.
        kind: What the unit is built of.
        layers: Its layers in order; a residual unit ends with its ``add``.
        residual: Whether the unit's input is added to its output.
        stage: Index j of the stage from 1, or 0 outside the stages.
        position: Index of the block in its stage from 0.
    """

    name: str
    kind: UnitKind
    layers: tuple[Layer, ...]
    residual: bool = False
    stage: int = 0
    position: int = 0

    @property
    def in_channels(self) -> int:
        """Channels of the unit's input."""
        return self.layers[0].in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the unit's output."""
        return self.layers[-1].out_channels

    @property
    def in_size(self) -> int:
        """Height and width of the unit's input in pixels."""
        return self.layers[0].in_size

    @property
    def out_size(self) -> int:
        """Height and width of the unit's output in pixels."""
        return self.layers[-1].out_size

    def layer(self, suffix: str) -> Layer | None:
        """The layer whose name ends with ``.suffix``, or None."""
        return next((layer for layer in self.layers if layer.name.endswith("." + suffix)), None)


@dataclass(frozen=True, slots=True)
class Network:
    """A subnet as a list of units.

    Attributes:
        image_size: Height and width of the input in pixels.
        in_channels: Channels of the input.
        n_classes: Outputs.
        units: The units in order.

    Examples:
        >>> from foxnas_mlflow import build_network, get_space
        >>> space = get_space("cpu")
        >>> network = build_network(space, space.largest(224))
        >>> network.image_size, network.n_classes
        (224, 1000)
    """

    image_size: int
    in_channels: int
    n_classes: int
    units: tuple[Unit, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in order."""
        return tuple(layer for unit in self.units for layer in unit.layers)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels before and after of TensorFlow's SAME padding of `size` pixels: half of `total`, the odd one after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def build_network(space: SearchSpace, architecture: Architecture) -> Network:
    """Walk an architecture of a space into units and layers.

    Raises:
        InvalidArchitectureError: If the architecture does not belong to the space.

    Examples:
        >>> from foxnas_mlflow import build_network, get_space
        >>> space = get_space("cpu")
        >>> network = build_network(space, space.smallest(192))
        >>> network.layers[0].op, network.layers[-1].out_channels
        ('conv', 1000)
    """
    space.validate(architecture)
    units = list(stem_units(space, architecture.image_size))
    sizes = space.stage_input_sizes(architecture.image_size)
    for j, stage in enumerate(architecture.stages):
        for i, block in enumerate(stage.blocks):
            units.append(stage_unit(space, j, i, block, sizes))
    units.extend(tail_units(space, architecture.image_size))
    return Network(architecture.image_size, space.in_channels, space.n_classes, tuple(units))


def stem_units(space: SearchSpace, image_size: int) -> tuple[Unit, ...]:
    """The fixed units before the first stage: stem and separable first block."""
    stem_width, first_width = space.channels(space.stem_width), space.channels(space.first_width)
    size = -(-image_size // space.stem_stride)
    stem = Layer(
        "stem.conv",
        "conv",
        image_size,
        size,
        space.in_channels,
        stem_width,
        kernel=3,
        stride=space.stem_stride,
        activation="relu6",
        norm=True,
    )
    first = _unit("first", "separable", size, stem_width, first_width, 3, space.first_stride, 1)
    return Unit("stem", "conv", (stem,)), first


def stage_unit(space: SearchSpace, stage: int, position: int, block: Block, sizes: tuple[int, ...]) -> Unit:
    """One block of a stage.

    Args:
        space: The search space.
        stage: Index of the stage from 0.
        position: Index of the block in the stage from 0; only the first changes channels and size.
        block: Its expansion ratio and kernel size.
        sizes: `SearchSpace.stage_input_sizes` of the image size.
    """
    spec = space.stages[stage]
    out_channels = space.channels(spec.width)
    if position > 0:
        in_channels, size, stride = out_channels, sizes[stage + 1], 1
    else:
        before = space.first_width if stage == 0 else space.stages[stage - 1].width
        in_channels, size, stride = space.channels(before), sizes[stage], spec.stride
    name = f"stage{stage + 1}.block{position}"
    return _unit(
        name, spec.block, size, in_channels, out_channels, block.kernel, stride, block.expansion, stage + 1, position
    )


def tail_units(space: SearchSpace, image_size: int) -> tuple[Unit, ...]:
    """The fixed units after the last stage: tail block or convolution, pool, hidden layer, classifier."""
    units = []
    size = space.stage_input_sizes(image_size)[-1]
    channels = space.channels(space.stages[-1].width)
    tail = space.tail
    if tail.block_width is not None:
        width = space.channels(tail.block_width)
        units.append(_unit("tail.block", "mbconv", size, channels, width, 3, 1, tail.block_expansion))
        channels = width
    if tail.conv_width is not None:
        width = space.channels(tail.conv_width)
        conv = Layer("tail.conv", "conv", size, size, channels, width, activation="relu6", norm=True)
        units.append(Unit("tail", "conv", (conv,)))
        channels = width
    layers = [Layer("head.pool", "pool", size, 1, channels, channels)]
    if tail.hidden_width is not None:
        width = space.channels(tail.hidden_width)
        layers.append(Layer("head.hidden", "conv", 1, 1, channels, width, activation="relu6"))
        channels = width
    layers.append(Layer("head.classifier", "linear", 1, 1, channels, space.n_classes))
    units.append(Unit("head", "head", tuple(layers)))
    return tuple(units)


def _unit(
    name: str,
    kind: BlockType | Literal["separable"],
    size: int,
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int,
    expansion: int,
    stage: int = 0,
    position: int = 0,
) -> Unit:
    hidden = make_divisible(in_channels * expansion) if kind != "separable" else in_channels
    out_size = -(-size // stride)
    spatial = functools.partial(Layer, kernel=kernel, stride=stride, activation="relu6", norm=True)
    layers = []
    if kind == "fused":
        layers.append(spatial(f"{name}.expand", "conv", size, out_size, in_channels, hidden))
    else:
        if kind != "separable":
            expand = Layer(f"{name}.expand", "conv", size, size, in_channels, hidden, activation="relu6", norm=True)
            layers.append(expand)
        layers.append(spatial(f"{name}.depthwise", "depthwise", size, out_size, hidden, hidden))
    if kind == "mbconv_se":
        squeeze = make_divisible(hidden // SE_REDUCTION)
        layers.append(Layer(f"{name}.se", "se", out_size, out_size, hidden, hidden, squeeze=squeeze))
    layers.append(Layer(f"{name}.project", "conv", out_size, out_size, hidden, out_channels, norm=True))
    residual = stride == 1 and in_channels == out_channels
    if residual:
        layers.append(Layer(f"{name}.add", "add", out_size, out_size, out_channels, out_channels))
    return Unit(name, kind, tuple(layers), residual, stage, position)
