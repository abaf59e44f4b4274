"""What a step of a training computes: the networks of that step, and who teaches them.

A strategy draws from the generator that it is given alone, so a step's networks are a function of
(seed, step): a resumed training and all ranks draw the same ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.supernet._network import PlainNetwork, Supernet

if TYPE_CHECKING:
    from foxnas_mlflow.supernet._optimizer import Sgd
    from foxnas_mlflow.supernet._state import TrainConfig, TrainingState

TrainedNetwork = Supernet | PlainNetwork
"""What can be trained: a supernet, or one network alone."""

Copies = Callable[[int], list[Any]]
"""Gives n modules over the trained weights, which can compute at the same time; the first is the trained one."""


class BaseStrategy(ABC):
    """How the networks of a step are chosen and taught.

    Attributes:
        name: Its name in configurations and checkpoints.
        phases: Where its phases begin, as ascending shares of the steps; the first is 0.
        first_teaches: Whether a step's first network teaches the others, by its answers in the same step.
        first_weight: Weight of the first network's loss beside the others'.
    """

    name: ClassVar[str]
    phases: ClassVar[tuple[float, ...]] = (0.0,)
    first_teaches: ClassVar[bool] = False
    first_weight: ClassVar[float] = 1.0

    def __init__(self, config: TrainConfig) -> None:
        self._config = config

    def phase(self, step: int, n_steps: int) -> int:
        """Phase of a step, counted from 0."""
        return sum(step >= share * n_steps for share in self.phases) - 1

    def begin(self, phase: int, state: TrainingState, optimizer: Sgd) -> None:  # noqa: B027 - most have one phase
        """Called before the first step of every phase but the first."""

    @abstractmethod
    def prepare(self, network: TrainedNetwork, copies: Copies, phase: int, rng: np.random.Generator) -> list[Any]:
        """The modules that a step computes, each set to its subnet; their `image_size` says what they see."""


class _Elastic(BaseStrategy):
    """Trains subnets of a supernet."""

    @abstractmethod
    def draw(self, space: SearchSpace, phase: int, rng: np.random.Generator) -> list[Architecture]:
        """The subnets of a step."""

    def prepare(self, network: TrainedNetwork, copies: Copies, phase: int, rng: np.random.Generator) -> list[Any]:
        if not isinstance(network, Supernet):
            raise InvalidInputError(f"the strategy {self.name} trains a supernet", received=type(network).__name__)
        subnets = self.draw(network.space, phase, rng)
        modules = copies(len(subnets))
        for module, subnet in zip(modules, subnets, strict=True):
            module.style = network.style
            module.set_subnet(subnet)
        return modules


class Sandwich(_Elastic):
    """Largest, random and smallest subnets in every step, both ends at any image size half of the time.

    All learn from the labels, the others also from the largest's answers in the same step (in-place
    distillation: Yu et al., 2019).
    """

    name = "sandwich"
    first_teaches = True
    # What the largest network learns sooner, all do. The others' losses have two terms, labels and its
    # answers, so that it would have the least of the gradient otherwise.
    first_weight = 4.0

    def draw(self, space: SearchSpace, phase: int, rng: np.random.Generator) -> list[Architecture]:
        drawn = space.sample(rng, n=self._config.n_random)
        # Half of the time at any size: else small kernels would learn small images only, and large ones large images.
        any_size = [int(size) for size in rng.choice(space.image_sizes, 2)]
        largest, smallest = (None if rng.random() < 0.5 else size for size in any_size)
        return [space.largest(largest), *drawn, space.smallest(smallest)]


class ProgressiveShrinking(_Elastic):
    """The largest network first, then elastic kernel, depth and expansion (paper section 3.2).

    One random subnet a step, taught by the largest network as it was when its phase ended. The
    phases begin at once-for-all's proportions: the largest network takes most, elastic kernels least.
    """

    name = "progressive_shrinking"
    phases = (0.0, 0.4, 0.52, 0.7)
    _KERNELS, _DEPTHS, _EXPANSIONS = 1, 2, 3

    def begin(self, phase: int, state: TrainingState, optimizer: Sgd) -> None:
        supernet = state.supernet
        if phase == self._KERNELS:
            largest = supernet.extract(supernet.space.largest())
            state.teacher = {name: t.detach().clone() for name, t in largest.state_dict().items()}
        elif phase == self._EXPANSIONS:
            supernet.sort_channels()
            # Its velocities and averages are those of other channels now.
            optimizer.velocity.clear()
            state.average.clear()

    def draw(self, space: SearchSpace, phase: int, rng: np.random.Generator) -> list[Architecture]:
        limited = space.replace(
            kernels=space.kernels if phase >= self._KERNELS else space.kernels[-1:],
            depths=space.depths if phase >= self._DEPTHS else space.depths[-1:],
            expansions=space.expansions if phase >= self._EXPANSIONS else space.expansions[-1:],
        )
        return list(limited.sample(rng, n=1))


class Alone(BaseStrategy):
    """One network with weights of its own."""

    name = "alone"

    def prepare(self, network: TrainedNetwork, copies: Copies, phase: int, rng: np.random.Generator) -> list[Any]:
        return copies(1)


STRATEGIES: Mapping[str, type[BaseStrategy]] = {
    strategy.name: strategy for strategy in (Sandwich, ProgressiveShrinking, Alone)
}


def strategy_of(config: TrainConfig) -> BaseStrategy:
    """The strategy that a configuration names."""
    return STRATEGIES[config.strategy](config)
