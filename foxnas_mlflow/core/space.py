"""Search spaces as data (paper section 3.2, table 2).

A space is a fixed stem and first block, elastic stages, and a fixed tail. The two built-in
spaces follow the paper; their stem, widths, strides and tails, which the paper does not print,
are those of the networks that the authors measured (MobileNetV3-Large for ``cpu``,
MobileNet-EdgeTPU for ``tpu``). A user's own space is the same dataclass, written as YAML.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np

from foxnas_mlflow.core.architecture import Architecture, Block, Stage
from foxnas_mlflow.core.errors import InvalidArchitectureError, InvalidSpaceError
from foxnas_mlflow.core.files import json_digest, sought
from foxnas_mlflow.core.random import pick

SPACE_FORMAT = 1

BlockType = Literal["mbconv", "mbconv_se", "fused"]
"""`mbconv`: expand 1x1, depthwise, project 1x1. `mbconv_se`: with squeeze-excite after the
depthwise convolution. `fused`: one dense k x k expansion, project 1x1 (the paper's type 3)."""


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round a channel count to a multiple of `divisor`, never losing more than 10 %.

    The rule of the MobileNet family, which once-for-all's weights follow.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


@dataclass(frozen=True, slots=True)
class StageSpec:
    """The fixed properties of an elastic stage.

    Attributes:
        width: Output channels before the width multiplier.
        stride: Stride of the stage's first block, 1 or 2.
        block: Block type of all blocks of the stage.
    """

    width: int
    stride: int
    block: BlockType

    def __post_init__(self) -> None:
        _positive("a stage's width", self.width)
        _stride("a stage's stride", self.stride)
        if self.block not in get_args(BlockType):
            raise InvalidSpaceError(
                f"a stage's block must be one of {list(get_args(BlockType))}", received=repr(self.block)
            )


@dataclass(frozen=True, slots=True)
class Tail:
    """The fixed layers after the last stage; each is left out when it is None.

    Attributes:
        block_width: Output channels of one fixed MBConv block (TPU space: 192).
        block_expansion: Its expansion ratio.
        conv_width: Channels of a 1x1 convolution before the global average pool (CPU space: 960).
        hidden_width: Channels of a 1x1 layer after the pool (CPU space: 1280).
    """

    block_width: int | None = None
    block_expansion: int = 6
    conv_width: int | None = None
    hidden_width: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_width", "conv_width", "hidden_width"):
            if getattr(self, name) is not None:
                _positive(f"the tail's {name}", getattr(self, name))
        _positive("the tail's block_expansion", self.block_expansion)


@dataclass(frozen=True)
class SearchSpace:
    """A search space: everything that an `Architecture` leaves open, and what it may choose.

    Attributes:
        name: Name written into every architecture of the space.
        image_sizes: Candidate image sizes in pixels, ascending.
        kernels: Candidate kernel sizes k, odd, ascending.
        expansions: Candidate expansion ratios e, ascending.
        depths: Candidate depths D of a stage, ascending.
        stages: The elastic stages.
        tail: The fixed layers behind them.
        stem_width, stem_stride: The 3x3 stem convolution.
        first_width, first_stride: The separable first block.
        width_mult: Multiplies every channel count (rounded by `make_divisible`).
        in_channels: 3 for colour, 1 for grey images.
        n_classes: Outputs of the classifier.

    Raises:
        InvalidSpaceError: If a value breaks a rule.

    Examples:
        >>> from foxnas_mlflow import get_space
        >>> space = get_space("cpu")
        >>> space.kernels, space.expansions, space.depths
        ((3, 5, 7), (2, 3, 4, 6), (2, 3, 4))
        >>> space.replace(kernels=(3,)).n_architectures < space.n_architectures
        True
    """

    name: str
    image_sizes: tuple[int, ...]
    kernels: tuple[int, ...]
    expansions: tuple[int, ...]
    depths: tuple[int, ...]
    stages: tuple[StageSpec, ...]
    tail: Tail = field(default_factory=Tail)
    stem_width: int = 16
    stem_stride: int = 2
    first_width: int = 16
    first_stride: int = 1
    width_mult: float = 1.0
    in_channels: int = 3
    n_classes: int = 1000

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InvalidSpaceError("a space must have a name", received=repr(self.name))
        for name in ("image_sizes", "kernels", "expansions", "depths"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise InvalidSpaceError(f"{name} must be a non-empty list", received=repr(values))
            for value in values:
                _positive(f"each of {name}", value)
            if list(values) != sorted(set(values)):
                raise InvalidSpaceError(f"{name} must ascend without repetition", received=repr(list(values)))
            object.__setattr__(self, name, tuple(values))
        if any(k % 2 == 0 for k in self.kernels):
            raise InvalidSpaceError("kernel sizes must be odd", received=list(self.kernels))
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise InvalidSpaceError("a space must have at least one stage", received=[])
        for name in ("stem_width", "first_width", "in_channels", "n_classes"):
            _positive(name, getattr(self, name))
        for name in ("stem_stride", "first_stride"):
            _stride(name, getattr(self, name))
        if not isinstance(self.width_mult, int | float) or not 0.05 <= self.width_mult <= 20:
            raise InvalidSpaceError("width_mult must be between 0.05 and 20", received=repr(self.width_mult))
        object.__setattr__(self, "width_mult", float(self.width_mult))
        if self.in_channels not in (1, 3):
            raise InvalidSpaceError("in_channels must be 1 or 3", received=self.in_channels)
        smallest = self.image_sizes[0]
        if smallest < self.total_stride:
            raise InvalidSpaceError(
                f"image sizes must be at least the product of the strides, {self.total_stride} px",
                received=f"{smallest} px",
                remedy="use larger images or smaller stage strides",
            )

    # -- properties that follow ------------------------------------------------------------

    @property
    def n_stages(self) -> int:
        """Number of elastic stages, m."""
        return len(self.stages)

    @property
    def max_depth(self) -> int:
        """Largest depth of a stage."""
        return self.depths[-1]

    @property
    def total_stride(self) -> int:
        """Product of all strides: the smallest image that leaves one pixel before the pool."""
        return self.stem_stride * self.first_stride * math.prod(stage.stride for stage in self.stages)

    @property
    def kinds(self) -> tuple[Block, ...]:
        """Every block of the space, expansion major: `kinds[e_index * len(kernels) + k_index]`."""
        return _kinds(self.expansions, self.kernels)

    @property
    def n_architectures(self) -> int:
        """The exact number of architectures, all image sizes counted."""
        n_kinds = len(self.expansions) * len(self.kernels)
        per_stage = sum(n_kinds**depth for depth in self.depths)
        return len(self.image_sizes) * int(per_stage**self.n_stages)

    def channels(self, width: int) -> int:
        """Real channel count of a nominal width under the width multiplier."""
        return width if self.width_mult == 1.0 else make_divisible(width * self.width_mult)

    def stage_input_sizes(self, image_size: int) -> tuple[int, ...]:
        """Height and width in pixels at the input of each stage, and after the last one."""
        size = _ceil_div(_ceil_div(image_size, self.stem_stride), self.first_stride)
        sizes = [size]
        for stage in self.stages:
            size = _ceil_div(size, stage.stride)
            sizes.append(size)
        return tuple(sizes)

    @property
    def digest(self) -> str:
        """SHA-256 of the space's JSON: two spaces with the same digest build the same networks."""
        return json_digest(self.to_dict())

    def replace(self, **changes: Any) -> SearchSpace:
        """A copy with some fields changed, for example ``space.replace(n_classes=10)``."""
        return dataclasses.replace(self, **changes)

    # -- architectures of the space ----------------------------------------------------------

    def validate(self, architecture: Architecture) -> Architecture:
        """Return the architecture if it belongs to this space.

        Raises:
            InvalidArchitectureError: If a value is not among the space's candidates.
        """
        _member("the architecture's space", architecture.space, (self.name,))
        _member("image_size", architecture.image_size, self.image_sizes)
        widths = tuple(stage.width for stage in architecture.stages)
        expected = tuple(stage.width for stage in self.stages)
        if widths != expected:
            raise InvalidArchitectureError(
                f"the stages of space {self.name!r} have the widths {list(expected)}", received=list(widths)
            )
        for stage in architecture.stages:
            _member(f"the depth of stage {stage.width}", stage.depth, self.depths)
            for block in stage.blocks:
                # Words are for what breaks a rule: tables have hundreds of thousands of blocks.
                if block.expansion not in self.expansions or block.kernel not in self.kernels:
                    _member(f"an expansion ratio in stage {stage.width}", block.expansion, self.expansions)
                    _member(f"a kernel size in stage {stage.width}", block.kernel, self.kernels)
        return architecture

    def architecture(self, image_size: int, blocks: Sequence[Sequence[tuple[int, int]]]) -> Architecture:
        """Build and validate an architecture from (expansion, kernel) pairs, stage by stage."""
        if len(blocks) != self.n_stages:
            raise InvalidArchitectureError(
                f"space {self.name!r} has {self.n_stages} stages", received=f"{len(blocks)} stages"
            )
        stages = tuple(
            Stage(spec.width, tuple(Block(e, k) for e, k in stage))
            for spec, stage in zip(self.stages, blocks, strict=True)
        )
        return self.validate(Architecture(self.name, image_size, stages))

    def uniform(self, image_size: int, *, depth: int, expansion: int, kernel: int) -> Architecture:
        """The architecture whose stages all have this depth and whose blocks are all alike."""
        return self.architecture(image_size, [[(expansion, kernel)] * depth] * self.n_stages)

    def largest(self, image_size: int | None = None) -> Architecture:
        """The largest subnet: every choice at its maximum."""
        size = self.image_sizes[-1] if image_size is None else image_size
        return self.uniform(size, depth=self.depths[-1], expansion=self.expansions[-1], kernel=self.kernels[-1])

    def smallest(self, image_size: int | None = None) -> Architecture:
        """The smallest subnet: every choice at its minimum."""
        size = self.image_sizes[0] if image_size is None else image_size
        return self.uniform(size, depth=self.depths[0], expansion=self.expansions[0], kernel=self.kernels[0])

    @overload
    def sample(self, rng: np.random.Generator, *, image_size: int | None = None, n: None = None) -> Architecture: ...

    @overload
    def sample(self, rng: np.random.Generator, *, image_size: int | None = None, n: int) -> list[Architecture]: ...

    def sample(
        self, rng: np.random.Generator, *, image_size: int | None = None, n: int | None = None
    ) -> Architecture | list[Architecture]:
        """Draw architectures as the paper does: every parameter uniform and independent.

        Args:
            rng: Source of randomness.
            image_size: Fix the image size (px); otherwise it is drawn too.
            n: Number to draw.

        Returns:
            One `Architecture` if `n` is None, else a list of `n` of them.
        """
        drawn = [self._sample_one(rng, image_size) for _ in range(1 if n is None else n)]
        return drawn[0] if n is None else drawn

    def _sample_one(self, rng: np.random.Generator, image_size: int | None) -> Architecture:
        size = pick(rng, self.image_sizes) if image_size is None else image_size
        return self.architecture(size, self.draw_blocks(rng))

    def draw_blocks(self, rng: np.random.Generator) -> tuple[tuple[tuple[int, int], ...], ...]:
        """(expansion, kernel) of the blocks, stage by stage, of a random architecture."""
        return tuple(
            tuple((pick(rng, self.expansions), pick(rng, self.kernels)) for _ in range(pick(rng, self.depths)))
            for _ in self.stages
        )

    def neighbours(self, architecture: Architecture) -> Iterator[Architecture]:
        """Every architecture that differs in one parameter, without repetition.

        One expansion ratio, one kernel size or the image size takes another value, or the depth
        of a stage moves to the next candidate: going down removes its last blocks, going up
        appends copies of its last block.
        """
        self.validate(architecture)
        for size in self.image_sizes:
            if size != architecture.image_size:
                yield dataclasses.replace(architecture, image_size=size)
        for j, stage in enumerate(architecture.stages):
            position = self.depths.index(stage.depth)
            for other in (position - 1, position + 1):
                if 0 <= other < len(self.depths):
                    depth = self.depths[other]
                    blocks = stage.blocks[:depth] + stage.blocks[-1:] * (depth - stage.depth)
                    yield _with_stage(architecture, j, blocks)
            for i, block in enumerate(stage.blocks):
                for e in self.expansions:
                    if e != block.expansion:
                        yield _with_stage(architecture, j, _put(stage.blocks, i, Block(e, block.kernel)))
                for k in self.kernels:
                    if k != block.kernel:
                        yield _with_stage(architecture, j, _put(stage.blocks, i, Block(block.expansion, k)))

    # -- files -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The versioned JSON object of the space."""
        data = dataclasses.asdict(self)
        for key, value in data.items():
            if isinstance(value, tuple):
                data[key] = list(value)
        return {"format": SPACE_FORMAT, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchSpace:
        """Read the object written by `to_dict`, or a user's YAML of the same keys.

        Raises:
            InvalidSpaceError: If keys are unknown or missing, or a value breaks a rule.
        """
        if not isinstance(data, Mapping):
            raise InvalidSpaceError("a space must be a mapping of keys to values", received=data)
        values = dict(data)
        version = values.pop("format", SPACE_FORMAT)
        if version != SPACE_FORMAT:
            raise InvalidSpaceError(
                f"a space file must have format {SPACE_FORMAT}",
                received=version,
                remedy="read it with the release of foxnas-mlflow that wrote it, or a later one",
            )
        _known_keys(cls, values, "a space")
        stages = values.get("stages")
        if not isinstance(stages, Sequence) or isinstance(stages, str):
            raise InvalidSpaceError("stages must be a list of {width, stride, block}", received=stages)
        values["stages"] = tuple(_from_mapping(StageSpec, stage, "a stage") for stage in stages)
        if "tail" in values:
            values["tail"] = _from_mapping(Tail, values["tail"], "the tail")
        space: SearchSpace = _from_mapping(cls, values, "a space")
        return space

    @classmethod
    def from_yaml(cls, path: str | Path) -> SearchSpace:
        """Read a space from a YAML file.

        Raises:
            InvalidSpaceError: If the file cannot be read or is not a space.
        """
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidSpaceError("a space file must be readable", received=sought(path, error)) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidSpaceError("a space file must be YAML", received=str(path)) from error
        return cls.from_dict(data)


@functools.lru_cache(maxsize=16)
def _kinds(expansions: tuple[int, ...], kernels: tuple[int, ...]) -> tuple[Block, ...]:
    return tuple(Block(e, k) for e in expansions for k in kernels)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _positive(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidSpaceError(f"{what} must be a positive integer", received=repr(value))


def _stride(what: str, value: object) -> None:
    if type(value) is not int or value not in (1, 2):
        raise InvalidSpaceError(f"{what} must be the integer 1 or 2", received=repr(value))


def _member(what: str, value: object, candidates: Sequence[object]) -> None:
    if value not in candidates:
        raise InvalidArchitectureError(f"{what} must be one of {list(candidates)}", received=value)


def _put(blocks: tuple[Block, ...], i: int, block: Block) -> tuple[Block, ...]:
    return (*blocks[:i], block, *blocks[i + 1 :])


def _with_stage(architecture: Architecture, j: int, blocks: tuple[Block, ...]) -> Architecture:
    stages = list(architecture.stages)
    stages[j] = Stage(stages[j].width, blocks)
    return dataclasses.replace(architecture, stages=tuple(stages))


def _known_keys(cls: type, values: Mapping[str, Any], what: str) -> None:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise InvalidSpaceError(f"{what} has only the keys {sorted(known)}", received=f"also {unknown}")


def _from_mapping(cls: type, values: object, what: str) -> Any:
    if not isinstance(values, Mapping):
        raise InvalidSpaceError(f"{what} must be a mapping of keys to values", received=values)
    _known_keys(cls, values, what)
    try:
        return cls(**values)
    except TypeError as error:
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        raise InvalidSpaceError(f"{what} needs the keys {required}", received=sorted(values)) from error


CPU_SPACE = SearchSpace(
    name="cpu",
    image_sizes=(128, 160, 192, 224, 256, 288, 320),
    kernels=(3, 5, 7),
    expansions=(2, 3, 4, 6),
    depths=(2, 3, 4),
    stages=(
        StageSpec(24, 2, "mbconv"),
        StageSpec(40, 2, "mbconv_se"),
        StageSpec(80, 2, "mbconv"),
        StageSpec(112, 1, "mbconv_se"),
        StageSpec(160, 2, "mbconv_se"),
    ),
    tail=Tail(conv_width=960, hidden_width=1280),
)
"""The paper's CPU space: MobileNetV3-Large's skeleton with ReLU6 and e = 2 added."""

TPU_SPACE = SearchSpace(
    name="tpu",
    image_sizes=(128, 160, 192, 224, 256, 288, 320),
    kernels=(3,),
    expansions=(4, 6, 8),
    depths=(3, 4, 5),
    stages=(
        StageSpec(32, 2, "fused"),
        StageSpec(48, 2, "fused"),
        StageSpec(96, 2, "fused"),
        StageSpec(112, 1, "mbconv"),
        StageSpec(160, 2, "mbconv"),
    ),
    tail=Tail(block_width=192),
    stem_width=32,
    first_width=16,
)
"""The paper's TPU space: MobileNet-EdgeTPU's skeleton with fused blocks in the early stages."""

PROXYLESS_SPACE = SearchSpace(
    name="proxyless",
    image_sizes=(128, 160, 192, 224),
    kernels=(3, 5, 7),
    expansions=(3, 4, 6),
    depths=(2, 3, 4),
    stages=(
        StageSpec(24, 2, "mbconv"),
        StageSpec(40, 2, "mbconv"),
        StageSpec(80, 2, "mbconv"),
        StageSpec(96, 1, "mbconv"),
        StageSpec(192, 2, "mbconv"),
    ),
    tail=Tail(block_width=320, conv_width=1280),
    stem_width=32,
    first_width=16,
)
"""Once-for-all's ProxylessNAS space; its last block, elastic there, is fixed here (k = 3, e = 6)."""

LITE_SPACE = PROXYLESS_SPACE.replace(
    name="lite",
    image_sizes=(96, 128, 160, 192, 224),
    stages=(*PROXYLESS_SPACE.stages[:3], StageSpec(112, 1, "mbconv"), PROXYLESS_SPACE.stages[4]),
)
"""EfficientNet-Lite0's skeleton: no gates and ReLU6 throughout, so its published weights are ours as they are."""

BUILTIN_SPACES: Mapping[str, SearchSpace] = {
    space.name: space for space in (CPU_SPACE, TPU_SPACE, PROXYLESS_SPACE, LITE_SPACE)
}


def get_space(name_or_path: str) -> SearchSpace:
    """A built-in space by name, or a user's from a YAML file.

    Raises:
        InvalidSpaceError: If it is neither.

    Examples:
        >>> from foxnas_mlflow import get_space
        >>> get_space("tpu").name
        'tpu'
    """
    if name_or_path in BUILTIN_SPACES:
        return BUILTIN_SPACES[name_or_path]
    if Path(name_or_path).suffix in (".yaml", ".yml"):
        return SearchSpace.from_yaml(name_or_path)
    raise InvalidSpaceError(
        f"space must be one of {sorted(BUILTIN_SPACES)} or the path of a YAML file", received=name_or_path
    )
