"""Published single networks under our names: timm's and torchvision's MobileNetV3, and EfficientNet-Lite.

| timm                          | torchvision                    | here                              |
|-------------------------------|--------------------------------|-----------------------------------|
| conv_stem, bn1                | features.0                     | stem.conv                         |
| blocks.0.0.conv_dw, conv_pw   | features.1.block               | first.depthwise, first.project    |
| blocks.{i}.{j}.conv_pw        | features.{i}.block.0           | stage{j}.block{i}.expand          |
| .conv_dw                      | .block.1                       | .depthwise                        |
| .se.conv_reduce, conv_expand  | .block.2.fc1, fc2              | .se.reduce, .expand               |
| .conv_pwl                     | .block.{last}                  | .project                          |
| blocks.6.0.conv (MobileNetV3) | features.{last}                | tail.conv                         |
| blocks.6.0 (EfficientNet)     |                                | tail.block                        |
| conv_head                     | classifier.0                   | head.hidden, or tail.conv         |
| classifier                    | classifier.3                   | head.classifier                   |

EfficientNet-Lite comes under the names of the package ``efficientnet_pytorch`` too: ``_conv_stem``,
``_blocks.{i}._expand_conv``, ``_depthwise_conv``, ``_project_conv``, ``_conv_head``, ``_fc``. These are TensorFlow's
weights, with its padding and its constant of batch norm; TensorFlow's padding is ours. So are those that timm
calls ``tf_...``, under timm's names.

A stage begins where a block's output has another width; what the weights do not tell (activations, strides,
the constant of batch norm) is known of the family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.network import NORM_EPSILON
from foxnas_mlflow.supernet._source import Source
from foxnas_mlflow.supernet._style import SourceActivation, Style

_TORCHVISION_EPSILON = _TENSORFLOW_EPSILON = 1e-3

_SMALL_BLOCKS = 11
"""Blocks of MobileNetV3-Small; Large has 15."""

_KNOWN = (
    "timm's or torchvision's MobileNetV3-Large, MobileNetV3-Small or EfficientNet-Lite, efficientnet_lite_pytorch's "
    "EfficientNet-Lite, or once-for-all's MobileNetV3 or ProxylessNAS"
)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A convolution and its batch norm, or the two parts of a gate, by their prefixes."""

    conv: str
    norm: str = ""


_Block = dict[str, _Layer]
"""Layers of a block by our names: expand, depthwise, se.reduce, se.expand, project."""


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """Where a family keeps what."""

    stem: _Layer
    blocks: list[_Block]
    tail: list[tuple[str, _Layer]]
    epsilon: float
    symmetric: bool = True


def from_published(tensors: Mapping[str, Tensor], *, of_tensorflow: bool = False) -> Source:
    """A single network's state dict under our names.

    Args:
        tensors: The state dict.
        of_tensorflow: Whether weights under timm's names are TensorFlow's, which nothing in them tells.

    Raises:
        InvalidInputError: If it is not a network that is known here.
    """
    if "conv_stem.weight" in tensors:
        maker, skeleton = "timm", _timm(tensors, of_tensorflow=of_tensorflow)
    elif "features.0.0.weight" in tensors:
        maker, skeleton = "torchvision", _torchvision(tensors)
    elif "_conv_stem.weight" in tensors:
        maker, skeleton = "efficientnet_pytorch", _efficientnet_pytorch(tensors)
    else:
        raise _unknown(", ".join(list(tensors)[:3]))
    if len(skeleton.blocks) < 2 or "expand" in skeleton.blocks[0]:
        raise InvalidInputError("init must begin with a separable block", received=f"{maker}: another first block")
    names = _names(skeleton, tensors)
    values: dict[str, Tensor] = {}
    for name, layer in names.items():
        values |= _tensors(name, layer, tensors, skeleton.epsilon)
    swish = any(name == "head.hidden" for name, _ in skeleton.tail)
    if not swish and any(".se" in name for name in names):
        raise _unknown(f"{maker}: an EfficientNet with gates and swish")
    family, strides = _family(len(skeleton.blocks), swish)
    activations = _activations(list(names), len(skeleton.blocks)) if swish else {}
    if maker == "timm" and of_tensorflow:
        family += " of TensorFlow"
    return Source(f"{maker}'s {family}", values, Style(activations, symmetric=skeleton.symmetric), strides=strides)


def _unknown(received: str) -> InvalidInputError:
    return InvalidInputError(f"init must hold the weights of {_KNOWN}", received=received)


def _family(n_blocks: int, swish: bool) -> tuple[str, tuple[int, ...]]:
    if swish:
        large = "MobileNetV3-Large", (2, 1, 2, 2, 2, 1, 2)
        return large if n_blocks > _SMALL_BLOCKS else ("MobileNetV3-Small", (2, 2, 2, 2, 1, 2))
    return "EfficientNet-Lite", (2, 1, 2, 2, 2, 1, 2)


def _activations(layers: list[str], n_blocks: int) -> dict[str, SourceActivation]:
    """MobileNetV3's: ReLU in the first blocks, h-swish behind them, in the stem and in the head."""
    first_swish = 6 if n_blocks > _SMALL_BLOCKS else 3
    found: dict[str, SourceActivation] = {}
    blocks: list[str] = []
    for layer in layers:
        unit, _, last = layer.rpartition(".")
        if layer.startswith(("first.", "stage")):
            if last in ("expand", "depthwise") and not unit.endswith(".se"):
                if unit not in blocks:
                    blocks.append(unit)
                found[layer] = "hswish" if blocks.index(unit) >= first_swish else "relu"
        elif layer != "head.classifier":
            found[layer] = "hswish"
    return found


def _names(skeleton: _Skeleton, tensors: Mapping[str, Tensor]) -> dict[str, _Layer]:
    """Their layers by our names, in order."""
    names = {"stem.conv": skeleton.stem}
    first, *others = skeleton.blocks
    names |= {f"first.{layer}": where for layer, where in first.items()}
    # EfficientNet's last block has no stage of its own here, and no hidden layer behind it.
    lite = all(name != "head.hidden" for name, _ in skeleton.tail)
    stages = others[:-1] if lite else others
    stage, block, width = 0, 0, 0
    for layers in stages:
        projection = f"{layers['project'].conv}.weight"
        if projection not in tensors:
            raise _unknown(f"no tensor {projection!r}: other blocks")
        out = tensors[projection].shape[0]
        stage, block, width = (stage, block + 1, width) if out == width else (stage + 1, 0, out)
        names |= {f"stage{stage}.block{block}.{layer}": where for layer, where in layers.items()}
    if lite:
        names |= {f"tail.block.{layer}": where for layer, where in others[-1].items()}
    return names | dict(skeleton.tail)


def _timm(tensors: Mapping[str, Tensor], *, of_tensorflow: bool) -> _Skeleton:
    prefixes = sorted(
        {m[0] for m in map(re.compile(r"blocks\.\d+\.\d+\.").match, tensors) if m},
        key=lambda prefix: [int(i) for i in prefix.split(".")[1:3]],
    )
    blocks: list[_Block] = []
    tail: list[tuple[str, _Layer]] = []
    for p in prefixes:
        if f"{p}conv.weight" in tensors:
            tail.append(("tail.conv", _Layer(f"{p}conv", f"{p}bn1")))
            continue
        layers: _Block = {}
        expanded = f"{p}conv_pwl.weight" in tensors
        if expanded:
            layers["expand"] = _Layer(f"{p}conv_pw", f"{p}bn1")
        layers["depthwise"] = _Layer(f"{p}conv_dw", f"{p}bn2" if expanded else f"{p}bn1")
        if f"{p}se.conv_reduce.weight" in tensors:
            layers |= {"se.reduce": _Layer(f"{p}se.conv_reduce"), "se.expand": _Layer(f"{p}se.conv_expand")}
        layers["project"] = _Layer(f"{p}conv_pwl", f"{p}bn3") if expanded else _Layer(f"{p}conv_pw", f"{p}bn2")
        blocks.append(layers)
    if "bn2.weight" in tensors:
        tail.append(("tail.conv", _Layer("conv_head", "bn2")))
    else:
        tail.append(("head.hidden", _Layer("conv_head")))
    tail.append(("head.classifier", _Layer("classifier")))
    epsilon = _TENSORFLOW_EPSILON if of_tensorflow else NORM_EPSILON
    return _Skeleton(_Layer("conv_stem", "bn1"), blocks, tail, epsilon, symmetric=not of_tensorflow)


def _torchvision(tensors: Mapping[str, Tensor]) -> _Skeleton:
    count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("features."))
    blocks: list[_Block] = []
    for i in range(1, count - 1):
        parts = sorted({name.split(".")[3] for name in tensors if name.startswith(f"features.{i}.block.")}, key=int)
        gates = [part for part in parts if f"features.{i}.block.{part}.fc1.weight" in tensors]
        convs = [f"features.{i}.block.{part}" for part in parts if part not in gates]
        if len(convs) not in (2, 3):
            raise _unknown(f"torchvision: other blocks, the first is features.{i}")
        kinds = ("expand", "depthwise", "project")[-len(convs) :]
        layers: _Block = {}
        for kind, conv in zip(kinds, convs, strict=True):
            if kind == "project":
                for part in gates:
                    p = f"features.{i}.block.{part}"
                    layers |= {"se.reduce": _Layer(f"{p}.fc1"), "se.expand": _Layer(f"{p}.fc2")}
            layers[kind] = _Layer(f"{conv}.0", f"{conv}.1")
        blocks.append(layers)
    last = f"features.{count - 1}"
    tail = [
        ("tail.conv", _Layer(f"{last}.0", f"{last}.1")),
        ("head.hidden", _Layer("classifier.0")),
        ("head.classifier", _Layer("classifier.3")),
    ]
    return _Skeleton(_Layer("features.0.0", "features.0.1"), blocks, tail, _TORCHVISION_EPSILON)


def _efficientnet_pytorch(tensors: Mapping[str, Tensor]) -> _Skeleton:
    count = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("_blocks.")), default=-1)
    blocks: list[_Block] = []
    for p in (f"_blocks.{i}" for i in range(count)):
        layers: _Block = {}
        if f"{p}._expand_conv.weight" in tensors:
            layers["expand"] = _Layer(f"{p}._expand_conv", f"{p}._bn0")
        layers["depthwise"] = _Layer(f"{p}._depthwise_conv", f"{p}._bn1")
        if f"{p}._se_reduce.weight" in tensors:
            layers |= {"se.reduce": _Layer(f"{p}._se_reduce"), "se.expand": _Layer(f"{p}._se_expand")}
        layers["project"] = _Layer(f"{p}._project_conv", f"{p}._bn2")
        blocks.append(layers)
    tail = [("tail.conv", _Layer("_conv_head", "_bn1")), ("head.classifier", _Layer("_fc"))]
    return _Skeleton(_Layer("_conv_stem", "_bn0"), blocks, tail, _TENSORFLOW_EPSILON, symmetric=False)


def _tensors(name: str, layer: _Layer, theirs: Mapping[str, Tensor], epsilon: float) -> dict[str, Tensor]:
    """A layer's tensors by our names."""
    try:
        weight = theirs[f"{layer.conv}.weight"]
        if name == "head.hidden" and weight.ndim == 2:
            weight = weight[:, :, None, None]
        values = {f"{name}.weight": weight}
        if not layer.norm:
            bias = theirs.get(f"{layer.conv}.bias")
            values[f"{name}.bias"] = torch.zeros(len(weight)) if bias is None else bias
            return values
        for part in ("weight", "bias", "running_mean", "running_var"):
            values[f"{name}.norm.{part}"] = theirs[f"{layer.norm}.{part}"]
        # Their batch norms add another constant to variances: the sum is what matters.
        values[f"{name}.norm.running_var"] = values[f"{name}.norm.running_var"] + (epsilon - NORM_EPSILON)
    except KeyError as error:
        raise _unknown(f"no tensor {error.args[0]!r} for {name}") from error
    return values
