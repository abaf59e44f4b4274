"""A network as the TensorFlow Lite operators that run it.

The layer description knows squeeze-excite as one layer; TensorFlow Lite runs it as four
operators. This list is what the Keras mirror, the NumPy reference, the flatbuffer writer and the
checks share, so that all four mean the same graph:

| layer       | operators                                                             |
|-------------|-----------------------------------------------------------------------|
| `conv`      | CONV_2D (batch norm folded, ReLU6 fused)                              |
| `depthwise` | DEPTHWISE_CONV_2D (the same)                                          |
| `se`        | MEAN, CONV_2D + ReLU, CONV_2D + ReLU6, MUL                            |
| `add`       | ADD                                                                   |
| `pool`      | MEAN                                                                  |
| `linear`    | FULLY_CONNECTED                                                       |

A MEAN over a feature map of one pixel is left out: it changes nothing, and TensorFlow drops it.

The hard sigmoid relu6(x + 3) / 6 of a gate costs no operator: the 3 goes into the bias of the
gate's second convolution, its ReLU6 is fused, and 1/6 goes into the weights of the projection
that follows, which is linear in its input.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from foxnas_mlflow.core.errors import ConversionError
from foxnas_mlflow.core.network import Layer, Network

Kind = Literal["CONV_2D", "DEPTHWISE_CONV_2D", "MEAN", "MUL", "ADD", "FULLY_CONNECTED"]

INPUT = "input"
"""Name of the tensor that the image enters by."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One TensorFlow Lite operator of a network.

    Attributes:
        name: Name of the operator and of the tensor that it writes.
        kind: Builtin operator.
        inputs: Names of the tensors read: `INPUT` or names of earlier operators.
        layer: Name of the layer that it belongs to.
        out_shape: (height, width, channels) written; (n_classes,) for the classifier.
        in_channels: Channels of the first input.
        kernel, stride: Of a convolution, else 1.
        activation: Fused activation.
        weight: Prefix of its parameters in the weight dictionary, or empty.
        norm: Whether batch norm is folded into its parameters.
        weight_scale: Factor folded into the weights: 1/6 after a gate.
        bias_shift: Added to the bias: 3 inside a gate.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    layer: str
    out_shape: tuple[int, ...]
    in_channels: int
    _: KW_ONLY
    kernel: int = 1
    stride: int = 1
    activation: Literal["none", "relu", "relu6"] = "none"
    weight: str = ""
    norm: bool = False
    weight_scale: float = 1.0
    bias_shift: float = 0.0

    @property
    def out_channels(self) -> int:
        """Channels written."""
        return self.out_shape[-1]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the weights as TensorFlow Lite stores them."""
        if self.kind == "CONV_2D":
            return (self.out_channels, self.kernel, self.kernel, self.in_channels)
        if self.kind == "DEPTHWISE_CONV_2D":
            return (1, self.kernel, self.kernel, self.out_channels)
        return (self.out_channels, self.in_channels)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of the weights as PyTorch stores them."""
        if self.kind == "CONV_2D":
            return (self.out_channels, self.in_channels, self.kernel, self.kernel)
        if self.kind == "DEPTHWISE_CONV_2D":
            return (self.out_channels, 1, self.kernel, self.kernel)
        return (self.out_channels, self.in_channels)


def lower(network: Network) -> tuple[Operator, ...]:
    """The operators of a network in the order in which they run."""
    operators: list[Operator] = []
    current = INPUT
    gated = False
    for unit in network.units:
        unit_input = current
        for layer in unit.layers:
            if gated and layer.op != "conv":
                # True for every block of `core.network`: a gate is followed by its projection.
                raise ConversionError("a squeeze-excite gate must be followed by a convolution", received=layer.name)
            operators += _lower_layer(layer, current, unit_input, 1 / 6 if gated else 1.0)
            current = operators[-1].name
            gated = layer.op == "se"
    return tuple(operators)


def _lower_layer(layer: Layer, current: str, unit_input: str, weight_scale: float) -> list[Operator]:
    shape = (layer.out_size, layer.out_size, layer.out_channels)
    if layer.op in ("conv", "depthwise"):
        return [
            Operator(
                layer.name,
                "CONV_2D" if layer.op == "conv" else "DEPTHWISE_CONV_2D",
                (current,),
                layer.name,
                shape,
                layer.in_channels,
                kernel=layer.kernel,
                stride=layer.stride,
                activation=layer.activation,
                weight=layer.name,
                norm=layer.norm,
                weight_scale=weight_scale,
            )
        ]
    if layer.op == "se":
        pool, reduce, expand, gate = (f"{layer.name}.{part}" for part in ("pool", "reduce", "expand", "gate"))
        channels, squeeze = layer.in_channels, layer.squeeze
        operators = []
        if layer.in_size > 1:
            operators.append(Operator(pool, "MEAN", (current,), layer.name, (1, 1, channels), channels))
        entry = operators[-1].name if operators else current
        return [
            *operators,
            Operator(
                reduce, "CONV_2D", (entry,), layer.name, (1, 1, squeeze), channels, activation="relu", weight=reduce
            ),
            Operator(
                expand,
                "CONV_2D",
                (reduce,),
                layer.name,
                (1, 1, channels),
                squeeze,
                activation="relu6",
                weight=expand,
                bias_shift=3.0,
            ),
            Operator(gate, "MUL", (current, expand), layer.name, shape, channels),
        ]
    if layer.op == "add":
        return [Operator(layer.name, "ADD", (unit_input, current), layer.name, shape, layer.in_channels)]
    if layer.op == "pool":
        if layer.in_size == 1:
            return []
        return [Operator(layer.name, "MEAN", (current,), layer.name, shape, layer.in_channels)]
    return [
        Operator(
            layer.name,
            "FULLY_CONNECTED",
            (current,),
            layer.name,
            (layer.out_channels,),
            layer.in_channels,
            weight=layer.name,
        )
    ]
