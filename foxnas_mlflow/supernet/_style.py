"""What a network computes beside its weights, while it still is partly the network that they come from.

Published networks have other activations than ours, and pad strided convolutions on both sides alike.
A supernet that begins with their weights begins with their activations and padding too, and moves to
ours over the first steps of its training: an abrupt change would throw away what the weights know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor

SourceActivation = Literal["relu", "hswish"]


@dataclass(frozen=True)
class Style:
    """Activations and padding of a network.

    Attributes:
        activations: What the source has at those of our layers where it has not ReLU6.
        symmetric: Whether the source pads convolutions with stride 2 on both sides alike; TensorFlow's SAME
            has one pixel more at the end.
        share: Of the source's activations, in [0, 1]; ReLU6 has the rest. The padding is the source's at 1 only.
    """

    activations: Mapping[str, SourceActivation] = dataclasses.field(default_factory=dict)
    symmetric: bool = False
    share: float = 0.0

    @property
    def pads_alike(self) -> bool:
        """Whether convolutions with stride 2 pad on both sides alike now."""
        return self.symmetric and self.share == 1

    def at(self, share: float) -> Style:
        """The same source with another share."""
        return dataclasses.replace(self, share=share)

    def activate(self, layer: str, x: Tensor) -> Tensor:
        """The activation of a layer that ends with ReLU6 in our networks; may change `x` in place."""
        source = self.activations.get(layer) if self.share else None
        if source is None:
            return _relu6(x)
        theirs = F.hardswish(x) if source == "hswish" else F.relu(x)
        return theirs if self.share == 1 else self.share * theirs + (1 - self.share) * F.relu6(x)

    def to_dict(self) -> dict[str, Any]:
        """The source as JSON values."""
        return {"activations": dict(self.activations), "symmetric": self.symmetric}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Style:
        """Read what `to_dict` wrote."""
        return cls(dict(data["activations"]), bool(data["symmetric"]))


OURS = Style()
"""ReLU6 and TensorFlow's SAME padding: what every finished network has."""


class _ReLU6(torch.autograd.Function):
    """ReLU6 in place.

    PyTorch's own keeps a copy of what was before, for its gradient; but that is known from the
    result, which the next layer keeps anyway. A third of training's memory is saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.clamp_(0, 6)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, y, 0, 6)  # type: ignore[no-any-return]


def _relu6(x: Tensor) -> Tensor:
    y: Tensor = _ReLU6.apply(x)  # type: ignore[no-untyped-call]
    return y
