"""How a supernet is trained, as `supernet` and `main` are asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._request import PresetName, Request, parameter


@dataclass(frozen=True, kw_only=True)
class TrainingRequest(Request):
    """From which images, and how; base of the requests that train a supernet."""

    data: str = parameter(
        "glyphs", "Images: glyphs, digits, fashion-mnist, or a folder (IDX, one folder a class, train/ and val/)."
    )
    preset: PresetName = parameter("tiny", "Size of images and of training.")
    epochs: int = parameter(0, "Passes of the supernet over the training images; 0: the preset's.", at_least=0)
    init: str = parameter(
        "", "Weights to begin with: models:/NAME/VERSION of a supernet, timm:NAME, torchvision:NAME or a file."
    )
    teacher: str = parameter("", "URI of an MLflow model whose probabilities are learned beside the labels.")
    class_weights: Literal["none", "balanced"] = parameter(
        "none", "Weight of a class in the loss: none, or balanced: by how seldom it is."
    )
    sampling: Literal["all", "balanced"] = parameter(
        "all",
        "How an epoch draws images: all, each once, or balanced: every class as often, rare ones again and again.",
    )
    background: int = parameter(
        255, "Grey level behind transparent parts of pictures, 0 (black) to 255 (white).", at_least=0, below=256
    )
    max_train: int = parameter(0, "Train on at most so many images, drawn by class; 0: all.", at_least=0)

    def check(self) -> None:
        """Rare classes are made up for once."""
        super().check()
        if "balanced" == self.class_weights == self.sampling:
            raise InvalidInputError(
                "class_weights and sampling both make up for rare classes",
                received="balanced for both",
                remedy="give one of them",
            )
