"""A network as its int8 file computes it, in floats that can be trained: quantization-aware finetuning.

Every tensor of the file is rounded to the file's grid (scale and zero point), weights to 127 levels on either side of
zero, a scale an output channel, biases to the grid of their sums, as TensorFlow Lite's int8 kernels have it. Gradients
pass the rounding unchanged and stop where a value is cut off. Batch norms are folded with the statistics they have.

| network      | operators of the file                                       |
|--------------|-------------------------------------------------------------|
| conv, linear | weights, bias, activation, rounded once                     |
| se           | mean, two convolutions and a product, each rounded          |
| add, pool    | rounded once                                                |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from numpy.typing import NDArray
from torch import Tensor

from foxnas_mlflow.core.network import NORM_EPSILON, Layer, Network
from foxnas_mlflow.supernet._finetune import alone, train_alone
from foxnas_mlflow.supernet._network import PlainNetwork, _at, _convolve, _load
from foxnas_mlflow.supernet._step import Teacher
from foxnas_mlflow.supernet._trainer import TrainingBatches

INPUT = "input"
"""Name of the tensor that the image enters by."""

_LEVELS = 127
_MAX_BIAS = 2.0**30
"""Of a bias in units of its grid: a channel of tiny weights has a scale that a 32-bit bias can be written with."""

Grids = Mapping[str, tuple[float, int]]
"""Scale and zero point of the image and of each operator's output, by name."""


@dataclass(frozen=True, eq=False)
class Int8Parameters:
    """Parameters of one operator as the file holds them.

    Attributes:
        kernel: int8, in PyTorch's layout.
        scale: Of the weights: one an output channel, or one.
        bias: int32 (out,), in units of the input's scale times the weights'.
    """

    kernel: NDArray[np.int8]
    scale: NDArray[np.float32]
    bias: NDArray[np.int32]


@dataclass(frozen=True)
class Step:
    """One operator.

    Attributes:
        name: Its name and that of the tensor that it writes.
        kind: ``conv`` (of any layer with weights), ``reduce``, ``expand``, ``mean``, ``mul`` or ``add``.
        inputs: Names of the tensors read.
        layer: The layer that it belongs to.
        share: Factor of the weights: 1/6 after a gate, whose hard sigmoid is relu6(x + 3) / 6.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    layer: Layer
    share: float = 1.0


def steps_of(network: Network) -> list[Step]:
    """The operators of a network in the order in which they run."""
    steps: list[Step] = []
    current, share = INPUT, 1.0
    for unit in network.units:
        shortcut = current
        for layer in unit.layers:
            if layer.op == "se":
                pool, reduce, expand, gate = (f"{layer.name}.{part}" for part in ("pool", "reduce", "expand", "gate"))
                entry = current
                if layer.in_size > 1:
                    steps.append(Step(pool, "mean", (current,), layer))
                    entry = pool
                steps.append(Step(reduce, "reduce", (entry,), layer))
                steps.append(Step(expand, "expand", (reduce,), layer))
                steps.append(Step(gate, "mul", (current, expand), layer))
                current, share = gate, 1 / 6
                continue
            if layer.op == "add":
                steps.append(Step(layer.name, "add", (shortcut, current), layer))
            elif layer.op == "pool":
                if layer.in_size == 1:
                    continue
                steps.append(Step(layer.name, "mean", (current,), layer))
            else:
                steps.append(Step(layer.name, "conv", (current,), layer, share))
                share = 1.0
            current = steps[-1].name
    return steps


class SimulatedNetwork(PlainNetwork):
    """A plain network that rounds as its int8 file does.

    Args:
        network: Its description.
        weights: Its weights, see `PlainNetwork.from_weights`.
        grids: The file's.
        one_scale: Names of operators whose weights have one scale.

    Attributes:
        steps: Its operators.
    """

    def __init__(
        self,
        network: Network,
        weights: Mapping[str, NDArray[Any]],
        grids: Grids,
        *,
        one_scale: Collection[str] = (),
    ) -> None:
        super().__init__(network)
        _load(self, weights, "the same network", "give the architecture and space that they belong to")
        self.steps = steps_of(network)
        self._grids, self._one_scale = dict(grids), frozenset(one_scale)

    def trained(
        self,
        batches: TrainingBatches,
        *,
        epochs: int,
        learning_rate: float,
        teacher: Teacher | None = None,
        class_weights: tuple[float, ...] = (),
        progress: Callable[[int, int, float], None] | None = None,
    ) -> SimulatedNetwork:
        """This network, trained to be right as its file rounds; arguments as of `finetune`."""
        config = alone(epochs, learning_rate, class_weights)
        train_alone(self, batches, config, progress=progress, teacher=teacher)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, n_classes) of normalised images (n, channels, height, width)."""
        tensors = {INPUT: self.rounded(images, INPUT)}
        for step in self.steps:
            tensors[step.name] = self.compute(step, [tensors[name] for name in step.inputs])
        return tensors[self.steps[-1].name]

    def rounded(self, x: Tensor, name: str) -> Tensor:
        """A tensor on the grid of that name."""
        scale, zero_point = self._grids[name]
        y: Tensor = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)
        return y

    def compute(self, step: Step, inputs: Sequence[Tensor]) -> Tensor:
        """What an operator makes of values on the grids of its inputs."""
        x = inputs[0]
        if step.kind == "mean":
            y = x.mean((2, 3), keepdim=True)
        elif step.kind == "mul":
            y = x * inputs[1]
        elif step.kind == "add":
            y = x + inputs[1]
        else:
            y = self._weighed(step, x)
        return self.rounded(y, step.name)

    def parameters_of_file(self) -> dict[str, Int8Parameters]:
        """What the file holds for these weights, by operator."""
        found = {}
        with torch.no_grad():
            for step in self.steps:
                if step.kind in ("conv", "reduce", "expand"):
                    kernel, bias = self._folded(step)
                    scale = self._scales(step, kernel, bias)
                    by_channel = scale.view(-1, *[1] * (kernel.dim() - 1))
                    levels = (kernel * (1 / by_channel)).round().clamp(-_LEVELS, _LEVELS)
                    sums = (bias.double() / (self._grids[step.inputs[0]][0] * scale.double())).round()
                    kept = scale[:1] if step.name in self._one_scale else scale
                    found[step.name] = Int8Parameters(
                        levels.numpy().astype(np.int8), kept.numpy().copy(), sums.numpy().astype(np.int32)
                    )
        return found

    def _weighed(self, step: Step, x: Tensor) -> Tensor:
        kernel, bias = self._folded(step)
        scale = self._scales(step, kernel.detach(), bias.detach())
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        kernel = torch.fake_quantize_per_channel_affine(kernel, scale, zeros, 0, -_LEVELS, _LEVELS)
        grid = self._grids[step.inputs[0]][0] * scale
        bias = bias + ((bias / grid).round() * grid - bias).detach()
        if step.kind == "conv":
            layer = step.layer
            y = _convolve(x.flatten(1) if layer.op == "linear" else x, layer, kernel, None, self.style)
            y = y + (bias if layer.op == "linear" else bias[:, None, None])
            return y.clamp(0, 6) if layer.activation == "relu6" else y
        y = F.conv2d(x, kernel, bias)
        return y.clamp(min=0) if step.kind == "reduce" else y.clamp(0, 6)

    def _folded(self, step: Step) -> tuple[Tensor, Tensor]:
        """Weights and bias with batch norm and the gate's constants in them."""
        module = _at(self, step.layer.name)
        if step.kind != "conv":
            conv = getattr(module, step.kind)
            return conv.weight, conv.bias + (3.0 if step.kind == "expand" else 0.0)
        kernel, bias = module.weight, module.bias
        if step.layer.norm:
            norm = module.norm
            gain = norm.weight / torch.sqrt(norm.running_var + NORM_EPSILON)
            kernel = kernel * gain.view(-1, *[1] * (kernel.dim() - 1))
            bias = norm.bias - norm.running_mean * gain
        return kernel * step.share, bias

    def _scales(self, step: Step, kernel: Tensor, bias: Tensor) -> Tensor:
        """Scale of the weights of each output channel."""
        largest = kernel.abs().flatten(1).amax(1)
        if step.name in self._one_scale:
            largest = largest.amax().expand_as(largest)
        least = bias.abs() / (self._grids[step.inputs[0]][0] * _MAX_BIAS)
        if step.name in self._one_scale:
            least = least.amax().expand_as(least)
        return torch.maximum(largest / _LEVELS, least).clamp(min=1e-12).contiguous()
