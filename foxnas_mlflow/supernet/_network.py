"""The weight-shared supernet and the plain networks that it contains (paper section 3.2).

Both walk `build_network`'s description with the same function; the supernet slices its largest
layers, the plain network has layers of its own. Their parameters have the description's names, so
that ``stage1.block0.expand.weight`` means the same in a supernet, in a subnet and in a Keras mirror.

A subnet of the supernet uses, of the largest network,

- the first blocks of each stage (elastic depth),
- the first channels of each expansion (elastic expansion; `Supernet.sort_channels` puts the
  important ones first),
- the centre of each kernel through a learned linear map, 7 to 5 to 3, that begins as the identity
  (elastic kernel size, as in once-for-all).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from numpy.typing import NDArray
from torch import Tensor, nn

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidFormatError
from foxnas_mlflow.core.network import NORM_EPSILON, Layer, Network, build_network, same_padding
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.supernet._depthwise import depthwise
from foxnas_mlflow.supernet._style import OURS, Style
from foxnas_mlflow.supernet._threads import keep_to_processors

NORM_MOMENTUM = 0.1

_TO_NUMPY = {"running_mean": "mean", "running_var": "var"}
_TO_TORCH = {v: k for k, v in _TO_NUMPY.items()}


class PlainNetwork(nn.Module):
    """A network of fixed layers, with nothing elastic in it.

    Args:
        network: Its description; `Supernet.extract` fills the weights.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.style = OURS
        for layer in network.layers:
            if layer.op not in ("add", "pool"):
                _put(self, layer.name, _PlainGate(layer) if layer.op == "se" else _PlainLayer(layer))
        _begin_as_identity(self, network)

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images that it is made for."""
        return self.network.image_size

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, n_classes) of normalised images (n, channels, height, width)."""
        return _walk(self.network, images, lambda layer, x: self.get_submodule(layer.name)(x, self.style))

    def used_parameters(self) -> list[str]:
        """Names of all parameters: nothing here is left out by a choice."""
        return [name for name, _ in self.named_parameters()]

    @classmethod
    def from_weights(cls, network: Network, weights: Mapping[str, NDArray[Any]]) -> PlainNetwork:
        """A network with stored weights, in evaluation mode.

        Raises:
            InvalidFormatError: If names or shapes are those of another network.
        """
        plain = cls(network)
        _load(plain, weights, "the same network", "give the architecture and space that they belong to")
        return plain.eval()


class Supernet(nn.Module):
    """All subnets of a space in one set of weights.

    `forward` computes the subnet of the last `set_subnet`, at first the largest. The image size of
    the architecture is not enforced: padding follows the real input.

    Args:
        space: The search space.
    """

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space
        self.style = OURS
        network = build_network(space, space.largest())
        for layer in network.layers:
            if layer.op not in ("add", "pool"):
                kernels = space.kernels if _is_elastic(layer) else (layer.kernel,)
                gate = layer.op == "se"
                _put(self, layer.name, _ElasticGate(layer) if gate else _ElasticLayer(layer, kernels))
        _begin_as_identity(self, network)
        self.set_subnet(space.largest())

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the images that the chosen subnet is made for."""
        return self.network.image_size

    def set_subnet(self, architecture: Architecture) -> None:
        """Choose the subnet that `forward` computes.

        Raises:
            InvalidArchitectureError: If it does not belong to the space.
        """
        self.architecture = architecture
        self.network = build_network(self.space, architecture)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, n_classes) of normalised images (n, channels, height, width)."""
        return _walk(self.network, images, lambda layer, x: self.get_submodule(layer.name)(x, layer, self.style))

    def used_parameters(self) -> list[str]:
        """Names of the parameters that the chosen subnet's outputs depend on."""
        kernels = {layer.name: layer.kernel for layer in self.network.layers}
        names = []
        for name, _ in self.named_parameters():
            layer, _, parameter = name.rpartition(".")
            used = any(unit in kernels for unit in (layer, layer.rpartition(".")[0]))
            # A map to a smaller kernel is part of it and of those that are smaller still.
            if used and not (parameter.startswith("to") and int(parameter[2:]) < kernels[layer]):
                names.append(name)
        return names

    def alias(self) -> Supernet:
        """A supernet with the same memory for its weights, and gradients, statistics and a subnet of its own.

        Several threads can compute with aliases of one supernet, not with the supernet itself.
        """
        other = copy.deepcopy(self)
        for mine, its in zip(self.parameters(), other.parameters(), strict=True):
            its.data, its.grad = mine.data, None
        return other

    def extract(self, architecture: Architecture) -> PlainNetwork:
        """A plain network with copies of a subnet's weights, in this supernet's mode and on its device."""
        network = build_network(self.space, architecture)
        first = next(self.parameters())
        plain = PlainNetwork(network).to(first.device, first.dtype).train(self.training)
        plain.style = self.style
        with torch.no_grad():
            for layer in network.layers:
                if layer.op in ("add", "pool"):
                    continue
                values = _at(self, layer.name).tensors(layer)
                target = plain.get_submodule(layer.name)
                for name, tensor in (*target.named_parameters(), *target.named_buffers()):
                    tensor.copy_(values[name])
        return plain

    def sort_channels(self) -> None:
        """Sort each block's expanded channels by importance, the largest first.

        Importance is the L1 norm of the projection's weights that read the channel, as in
        once-for-all. The function of the largest subnet does not change; its optimizer's state
        would, so a new phase begins with a new one.
        """
        network = build_network(self.space, self.space.largest())
        with torch.no_grad():
            for unit in network.units:
                expand = unit.layer("expand")
                if not unit.stage or expand is None:
                    continue
                project = _at(self, f"{unit.name}.project").weight
                order = project.abs().sum(dim=(0, 2, 3)).argsort(descending=True, stable=True)
                project.copy_(project[:, order])
                for layer in unit.layers:
                    if layer.op == "se":
                        gate = _at(self, layer.name)
                        gate.reduce.weight.copy_(gate.reduce.weight[:, order])
                        _permute(gate.expand, order)
                        # The squeezed channels are a prefix too.
                        squeezed = gate.expand.weight.abs().sum(dim=(0, 2, 3)).argsort(descending=True, stable=True)
                        _permute(gate.reduce, squeezed)
                        gate.expand.weight.copy_(gate.expand.weight[:, squeezed])
                    elif layer.name.endswith((".expand", ".depthwise")):
                        _permute(self.get_submodule(layer.name), order)

    def numpy_weights(self) -> dict[str, NDArray[Any]]:
        """All parameters and statistics by name, as NumPy float32."""
        return _numpy(self)

    def load_numpy_weights(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Set all parameters and statistics.

        Raises:
            InvalidFormatError: If names or shapes are those of another space.
        """
        _load(self, weights, "the same space", "give the space that the supernet was trained in")

    @classmethod
    def from_weights(cls, space: SearchSpace, weights: Mapping[str, NDArray[Any]]) -> Supernet:
        """A supernet with stored weights, in evaluation mode."""
        supernet = cls(space)
        supernet.load_numpy_weights(weights)
        return supernet.eval()


def subnet_weights(plain: PlainNetwork) -> dict[str, NDArray[Any]]:
    """A plain network's parameters and statistics by name, as NumPy float32."""
    return _numpy(plain)


def plain_logits(
    network: Network, weights: Mapping[str, NDArray[Any]], images: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Logits (n, n_classes) of a network with stored weights, for normalised images (n, height, width, channels).

    Raises:
        InvalidFormatError: If the weights are those of another network.
    """
    keep_to_processors()
    plain = PlainNetwork.from_weights(network, weights)
    with torch.inference_mode():
        logits = plain(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    values: NDArray[np.float32] = logits.numpy()
    return values


def norms_of(module: nn.Module) -> Iterator[_Norm]:
    """All batch norms of a supernet or plain network."""
    return (m for m in module.modules() if isinstance(m, _Norm))


class _Norm(nn.Module):
    """Batch norm whose first channels can be used alone."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum = NORM_MOMENTUM

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return F.batch_norm(
            x,
            _first(self.running_mean, c),
            _first(self.running_var, c),
            _first(self.weight, c),
            _first(self.bias, c),
            self.training,
            self.momentum,
            NORM_EPSILON,
        )


class _Gate(nn.Module):
    """Squeeze-excite: pool, reduce, ReLU, expand, piecewise-linear hard sigmoid, multiply."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(layer.in_channels, layer.squeeze, 1)
        self.expand = nn.Conv2d(layer.squeeze, layer.in_channels, 1)

    def _scale(self, x: Tensor, squeeze: int) -> Tensor:
        c = x.shape[1]
        y = x.mean((2, 3))
        y = F.relu(F.linear(y, _first(self.reduce.weight, squeeze, c).flatten(1), _head(self.reduce, squeeze)))
        y = F.linear(y, _first(self.expand.weight, c, squeeze).flatten(1), _head(self.expand, c))
        return x * F.hardsigmoid(y)[..., None, None]

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        c, s = layer.in_channels, layer.squeeze
        return {
            "reduce.weight": self.reduce.weight[:s, :c],
            "reduce.bias": _head(self.reduce, s),
            "expand.weight": self.expand.weight[:c, :s],
            "expand.bias": _head(self.expand, c),
        }


class _ElasticLayer(nn.Module):
    """A layer of the largest subnet that computes any smaller one's.

    Args:
        layer: The largest one's description.
        kernels: Candidate kernel sizes, ascending.
    """

    def __init__(self, layer: Layer, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(_initial(layer))
        self.kernels = kernels
        if layer.norm:
            self.norm = _Norm(layer.out_channels)
            self.bias = None
        else:
            self.bias = nn.Parameter(torch.zeros(layer.out_channels))
        for small in kernels[:-1]:
            self.register_parameter(f"to{small}", nn.Parameter(torch.eye(small * small)))

    def forward(self, x: Tensor, layer: Layer, style: Style) -> Tensor:
        bias = None if self.bias is None else _first(self.bias, layer.out_channels)
        y = _convolve(x, layer, self._kernel(layer), bias, style)
        if layer.norm:
            y = self.norm(y)
        return style.activate(layer.name, y) if layer.activation == "relu6" else y

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """The parameters and statistics of a smaller layer, by the plain layer's names."""
        c = layer.out_channels
        values = {"weight": self._kernel(layer)}
        if layer.norm:
            values |= {f"norm.{name}": t[:c] for name, t in self.norm.state_dict().items()}
        elif self.bias is not None:
            values["bias"] = self.bias[:c]
        return values

    def _kernel(self, layer: Layer) -> Tensor:
        if layer.op == "linear":
            return _first(self.weight, layer.out_channels, layer.in_channels)
        inputs = layer.in_channels if layer.op == "conv" else 1
        weight = _first(self.weight, layer.out_channels, inputs)
        larger = self.kernels[-1]
        for small in reversed(self.kernels[:-1]):
            if larger == layer.kernel:
                break
            cut = (larger - small) // 2
            centre = weight[:, :, cut : cut + small, cut : cut + small]
            matrix = getattr(self, f"to{small}")
            weight = (centre.flatten(2) @ matrix.t()).reshape(centre.shape)
            larger = small
        return weight


class _ElasticGate(_Gate):
    def forward(self, x: Tensor, layer: Layer, style: Style) -> Tensor:
        return self._scale(x, layer.squeeze)


class _PlainLayer(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.weight = nn.Parameter(_initial(layer))
        self.bias = None if layer.norm else nn.Parameter(torch.zeros(layer.out_channels))
        if layer.norm:
            self.norm = _Norm(layer.out_channels)

    def forward(self, x: Tensor, style: Style) -> Tensor:
        y = _convolve(x, self.layer, self.weight, self.bias, style)
        if self.layer.norm:
            y = self.norm(y)
        return style.activate(self.layer.name, y) if self.layer.activation == "relu6" else y


class _PlainGate(_Gate):
    def forward(self, x: Tensor, style: Style) -> Tensor:
        return self._scale(x, self.reduce.out_channels)


def _walk(network: Network, images: Tensor, apply: Callable[[Layer, Tensor], Tensor]) -> Tensor:
    x = images
    for unit in network.units:
        shortcut = x
        for layer in unit.layers:
            if layer.op == "add":
                x = x + shortcut
            elif layer.op == "pool":
                x = x.mean((2, 3), keepdim=True)
            elif layer.op == "linear":
                x = apply(layer, x.flatten(1))
            else:
                x = apply(layer, x)
    return x


def _convolve(x: Tensor, layer: Layer, weight: Tensor, bias: Tensor | None, style: Style) -> Tensor:
    if layer.op == "linear":
        return F.linear(x, weight, bias)
    k, stride = layer.kernel, layer.stride
    before = k // 2
    if stride > 1 and not style.pads_alike:
        # PyTorch pads convolutions evenly only.
        before, after = same_padding(int(x.shape[-1]), k, stride)
        if before != after:
            x, before = F.pad(x, (before, after, before, after)), 0
    if layer.op == "depthwise":
        return depthwise(x, weight, stride=stride, padding=before)
    if k == 1 and x.shape[-2:].numel() == 1:
        # One pixel: a product is several times faster than a convolution.
        return F.linear(x.flatten(1), weight.flatten(1), bias)[..., None, None]
    return F.conv2d(x, weight, bias, stride, before)


def _is_elastic(layer: Layer) -> bool:
    return layer.name.startswith("stage") and layer.kernel > 1


def _initial(layer: Layer) -> Tensor:
    """He initialisation by fan-out for convolutions, small normal values for the classifier."""
    if layer.op == "linear":
        return torch.randn(layer.out_channels, layer.in_channels) * 0.01
    k = layer.kernel
    if layer.op == "depthwise":
        return torch.randn(layer.out_channels, 1, k, k) * math.sqrt(2 / (k * k))
    return torch.randn(layer.out_channels, layer.in_channels, k, k) * math.sqrt(2 / (k * k * layer.out_channels))


def _begin_as_identity(module: nn.Module, network: Network) -> None:
    """Zero the last norm's weights in residual units: a network learns as fast as a shallow one at first."""
    with torch.no_grad():
        for unit in network.units:
            if unit.layers[-1].op == "add":
                _at(module, unit.layers[-2].name).norm.weight.zero_()


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Add a module under a dotted name, making the modules between."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


def _at(root: nn.Module, name: str) -> Any:
    """The layer of a dotted name; PyTorch types every attribute of a module as module or tensor."""
    return root.get_submodule(name)


def _permute(module: nn.Module, order: Tensor) -> None:
    """Reorder a layer's output channels, in place."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not name.startswith("to"):
            tensor.copy_(tensor[order])


def _first(tensor: Tensor, *sizes: int) -> Tensor:
    """The first entries along each leading dimension; the tensor itself where that is all of it.

    A slice of everything would cost its gradient a copy.
    """
    for dim, size in enumerate(sizes):
        if tensor.shape[dim] != size:
            tensor = tensor.narrow(dim, 0, size)
    return tensor


def _head(conv: nn.Conv2d, n: int) -> Tensor:
    if conv.bias is None:
        raise TypeError("a gate's layers have biases")
    return _first(conv.bias, n)


def torch_name(name: str) -> str:
    """The name in a module's state of a weight that crosses to NumPy."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{_TO_TORCH.get(last, last)}"


def _load(module: nn.Module, weights: Mapping[str, NDArray[Any]], belonging: str, remedy: str) -> None:
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    received = {torch_name(name): np.asarray(values) for name, values in weights.items()}
    differing = sorted(
        name
        for name in {*expected, *received}
        if name not in expected or name not in received or received[name].shape != expected[name]
    )
    if differing:
        raise InvalidFormatError(
            f"the weights must belong to {belonging}",
            received=f"{len(differing)} arrays that differ, first {differing[0]}",
            remedy=remedy,
        )
    module.load_state_dict({name: torch.tensor(values, dtype=torch.float32) for name, values in received.items()})


def _numpy(module: nn.Module) -> dict[str, NDArray[Any]]:
    weights = {}
    for name, tensor in module.state_dict().items():
        stem, _, last = name.rpartition(".")
        weights[f"{stem}.{_TO_NUMPY.get(last, last)}"] = tensor.detach().cpu().float().numpy().copy()
    return weights
