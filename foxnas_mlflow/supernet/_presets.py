"""Presets: a space and a training schedule that fit a size of images and of purse.

| preset | images         | cost                                                            |
|--------|----------------|-----------------------------------------------------------------|
| tiny   | 12 to 24 px    | minutes on two processor cores: 15 epochs, at most 2,600 steps  |
| small  | 32 to 96 px    | hours on a processor, tens of minutes on a GPU                  |
| medium | 96 to 224 px   | photographs with known weights: likewise for a few thousand     |
| paper  | 128 to 320 px  | ImageNet: the paper's epochs, about 1,200 GPU hours             |

The parameter ``epochs`` of a training sets another number of passes, without a limit of steps. All
keep the candidate kernels, expansion ratios and depths of the built-in space that they shrink; a space
of one's own keeps its image sizes, strides and widths too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.space import BUILTIN_SPACES, SearchSpace, StageSpec


@dataclass(frozen=True, slots=True)
class Preset:
    """A size of spaces and the schedule to train them with.

    Attributes:
        name: Its name.
        image_sizes: Candidate image sizes in pixels; empty keeps the space's.
        strides: Strides of the stages; empty keeps the space's.
        width_mult: Width multiplier.
        epochs: Epochs of training.
        batch_size: Images a step.
        learning_rate: Peak learning rate at that batch size.
        weight_decay: Of weights.
        max_steps: Fewer epochs are trained where these would take more steps; 0: no limit.
    """

    name: str
    _: KW_ONLY
    image_sizes: tuple[int, ...]
    strides: tuple[int, ...]
    width_mult: float
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    max_steps: int = 0

    def epochs_for(self, n_steps: int) -> int:
        """Epochs of training when one has `n_steps` steps: 8 of 20,000 images with ``tiny``."""
        return min(self.epochs, max(self.max_steps // n_steps, 1)) if self.max_steps else self.epochs

    def space(self, base: SearchSpace, *, in_channels: int, n_classes: int) -> SearchSpace:
        """A built-in space in this size, for a data set's channels and classes.

        A space of one's own has its size already: only its channels and classes change.
        """
        if BUILTIN_SPACES.get(base.name) != base:
            return base.replace(in_channels=in_channels, n_classes=n_classes)
        changes = {"in_channels": in_channels, "n_classes": n_classes, "width_mult": self.width_mult * base.width_mult}
        if not self.image_sizes:
            return base.replace(**changes)
        strides = self.strides if base.n_stages == len(self.strides) else tuple(s.stride for s in base.stages)
        stages = tuple(
            StageSpec(spec.width, stride, spec.block) for spec, stride in zip(base.stages, strides, strict=True)
        )
        return base.replace(name=f"{base.name}-{self.name}", image_sizes=self.image_sizes, stages=stages, **changes)


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny",
            image_sizes=(12, 16, 20, 24),
            strides=(1, 2, 1, 1, 2),
            width_mult=0.35,
            epochs=15,
            batch_size=64,
            learning_rate=0.2,
            weight_decay=5e-4,
            max_steps=2600,
        ),
        Preset(
            "small",
            image_sizes=(32, 48, 64, 80, 96),
            strides=(2, 2, 1, 1, 2),
            width_mult=0.5,
            epochs=100,
            batch_size=128,
            learning_rate=0.2,
            weight_decay=5e-4,
        ),
        # The channels and strides of published weights, which a narrower space would break.
        Preset(
            "medium",
            image_sizes=(96, 128, 160, 192, 224),
            strides=(),
            width_mult=1.0,
            epochs=40,
            batch_size=128,
            learning_rate=0.2,
            weight_decay=5e-4,
        ),
        # Paper 3.2: once-for-all's 180 epochs of the largest network and its shrinking phases.
        Preset(
            "paper",
            image_sizes=(),
            strides=(),
            width_mult=1.0,
            epochs=425,
            batch_size=64,
            learning_rate=0.1,
            weight_decay=3e-5,
        ),
    )
}


def get_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        InvalidInputError: If there is none of that name.
    """
    if name not in PRESETS:
        raise InvalidInputError(f"preset must be one of {list(PRESETS)}", received=name)
    return PRESETS[name]
