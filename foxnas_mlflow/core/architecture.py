"""One architecture: a point of a search space, immutable, hashable and stored as JSON.

| symbol (paper 3.3) | name in code                 | meaning                                       |
|--------------------|------------------------------|-----------------------------------------------|
| j = 1..m           | ``stages[j - 1]``            | stage (the paper's unit type), m = 5          |
| D_j                | ``len(stages[j-1].blocks)``  | depth: number of blocks of the stage          |
| E, K of a block    | ``Block.expansion/kernel``   | expansion ratio, kernel size                  |
| E_{j,j+1} K_{j,j+1}| ``blocks[0]``                | the first block, which changes the channels   |
| E_j^avg, K_j^avg   | means over ``blocks[1:]``    | over the identity (residual) blocks           |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foxnas_mlflow.core.errors import InvalidArchitectureError, InvalidFormatError

ARCHITECTURE_FORMAT = 1


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """One block of a stage.

    Attributes:
        expansion: Expansion ratio: expanded channels / input channels, a positive integer.
        kernel: Kernel size, an odd positive integer.
    """

    expansion: int
    kernel: int

    def __post_init__(self) -> None:
        _require_int("a block's expansion ratio", self.expansion, minimum=1)
        _require_int("a block's kernel size", self.kernel, minimum=1)
        if self.kernel % 2 == 0:
            raise InvalidArchitectureError("a block's kernel size must be odd", received=self.kernel)


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: the first block changes the channels, the others are identity blocks.

    Attributes:
        width: Output channels of the stage before the space's width multiplier; names the stage.
        blocks: The blocks in order; their number is the depth D.
    """

    width: int
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        _require_int("a stage's width", self.width, minimum=1)
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.blocks:
            raise InvalidArchitectureError("a stage must have at least one block", received=self.width)

    @property
    def depth(self) -> int:
        """The number of blocks, D."""
        return len(self.blocks)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One subnet of a search space.

    The class checks form; whether the values belong to a space is checked by
    `SearchSpace.validate`, because a space is data that may be a user's own.

    Attributes:
        space: Name of the search space.
        image_size: Height and width of the input image in pixels.
        stages: The elastic stages in order.

    Examples:
        >>> from foxnas_mlflow import Architecture, get_space
        >>> network = get_space("cpu").smallest(192)
        >>> Architecture.from_json(network.to_json()) == network
        True
        >>> [stage.depth for stage in network.stages]
        [2, 2, 2, 2, 2]
    """

    space: str
    image_size: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.space, str) or not self.space:
            raise InvalidArchitectureError("an architecture names its space", received=self.space)
        _require_int("an image size (px)", self.image_size, minimum=1)
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise InvalidArchitectureError("an architecture must have at least one stage")

    @property
    def depths(self) -> tuple[int, ...]:
        """Depth D of each stage."""
        return tuple(stage.depth for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """The versioned JSON object of contract `architecture.json`."""
        return {
            "format": ARCHITECTURE_FORMAT,
            "space": self.space,
            "image_size": self.image_size,
            "stages": [
                {
                    "width": stage.width,
                    "blocks": [{"expansion": b.expansion, "kernel": b.kernel} for b in stage.blocks],
                }
                for stage in self.stages
            ],
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """JSON text; without `indent` it is compact and one line, fit for a table's cell."""
        separators = (",", ":") if indent is None else None
        return json.dumps(self.to_dict(), indent=indent, separators=separators)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Architecture:
        """Read the object written by `to_dict`.

        Raises:
            InvalidFormatError: If the format is unknown or newer, or keys are missing or unknown.
            InvalidArchitectureError: If a value breaks a rule.
        """
        _require_keys("an architecture", data, {"format", "space", "image_size", "stages"})
        if data["format"] != ARCHITECTURE_FORMAT:
            raise InvalidFormatError(
                f"architecture.json must have format {ARCHITECTURE_FORMAT}",
                received=data["format"],
                remedy="read it with the release of foxnas-mlflow that wrote it, or a later one",
            )
        if not isinstance(data["stages"], list):
            raise InvalidFormatError("an architecture's stages must be a list", received=data["stages"])
        stages = []
        for stage in data["stages"]:
            _require_keys("a stage", stage, {"width", "blocks"})
            if not isinstance(stage["blocks"], list):
                raise InvalidFormatError("a stage's blocks must be a list", received=stage["blocks"])
            blocks = []
            for block in stage["blocks"]:
                _require_keys("a block", block, _BLOCK_KEYS)
                blocks.append(_block(block["expansion"], block["kernel"]))
            stages.append(Stage(stage["width"], tuple(blocks)))
        return cls(data["space"], data["image_size"], tuple(stages))

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        """Read JSON text written by `to_json`.

        Raises:
            InvalidFormatError: If the text is not JSON or not an architecture.
            InvalidArchitectureError: If a value breaks a rule.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError) as error:
            raise InvalidFormatError("an architecture must be JSON text", received=text) from error
        return cls.from_dict(data)

    def __str__(self) -> str:
        stages = " | ".join(
            f"{stage.width}: " + " ".join(f"e{b.expansion}k{b.kernel}" for b in stage.blocks) for stage in self.stages
        )
        return f"{self.space} @ {self.image_size} px | {stages}"


_BLOCK_KEYS = {"expansion", "kernel"}
_BLOCKS: dict[tuple[int, int], Block] = {}
"""Blocks that were read: the hundreds of thousands of a table are a few, each once in memory."""


def _block(expansion: object, kernel: object) -> Block:
    if type(expansion) is int and type(kernel) is int:
        known = _BLOCKS.get((expansion, kernel))
        return known or _BLOCKS.setdefault((expansion, kernel), Block(expansion, kernel))
    return Block(expansion, kernel)  # type: ignore[arg-type]


def _require_int(what: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise InvalidArchitectureError(f"{what} must be an integer >= {minimum}", received=repr(value))


def _require_keys(what: str, data: object, keys: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise InvalidFormatError(f"{what} must be a JSON object", received=data)
    if data.keys() == keys:
        return
    missing, unknown = keys - set(data), set(data) - keys
    if missing:
        raise InvalidFormatError(f"{what} needs the keys {sorted(keys)}", received=f"without {sorted(missing)}")
    if unknown:
        raise InvalidFormatError(
            f"{what} has only the keys {sorted(keys)}", received=f"also {sorted(map(str, unknown))}"
        )
