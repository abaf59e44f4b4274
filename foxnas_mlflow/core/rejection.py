"""When a classifier should answer none of its classes: a temperature and a threshold on its confidence.

A network gives some class a high probability whatever it is shown. Here its logits are divided by a temperature, chosen
so that probabilities are as often right as they say (Guo et al., 2017, https://arxiv.org/abs/1706.04599); an image
whose largest probability is below a threshold is rejected. The threshold is the smallest at which no more than a given
share of negatives is accepted: of images that are none of the classes where there are some, else of the validation
images that are answered wrongly.

| symbol | in code        | shape          | what                                                            |
|--------|----------------|----------------|-----------------------------------------------------------------|
| z      | ``logits``     | (n, n_classes) | the network's output                                            |
| T      | ``temperature``| ()             | probabilities are softmax(z / T)                                |
| c      | ``confidence`` | (n,)           | largest probability                                             |
| t      | ``threshold``  | ()             | rejected where c < t                                            |

NumPy only, and of this package nothing but errors: it travels to boards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from foxnas_mlflow.core.errors import InvalidInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEMPERATURES = 0.25, 10.0
"""Between which a temperature is looked for."""

_CURVE_POINTS = 41
_STEPS = 60


@dataclass(frozen=True)
class Rejection:
    """How a model rejects, and what that was worth on the images that it was chosen on.

    Attributes:
        temperature: Divides the logits.
        threshold: Least confidence of an answer that is accepted, in [0, 1]; 0: everything is.
        max_false_accept: Share of negatives that may be accepted, as it was asked for.
        negatives: What they were: ``unknown images`` or ``wrong answers``.
        n_negatives: How many there were.
        false_accept: Share of them that is accepted.
        accepted: Share of the rightly answered validation images that is accepted.
        curve: (threshold, accepted, false_accept) at other thresholds, ascending.
    """

    temperature: float
    threshold: float
    max_false_accept: float
    negatives: str
    n_negatives: int
    false_accept: float
    accepted: float
    curve: tuple[tuple[float, float, float], ...] = ()

    def rejects(self, probabilities: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether each row of probabilities (n, n_classes), of temperature 1, is none of the classes."""
        rejected: NDArray[np.bool_] = confidence_of(probabilities, self.temperature) < self.threshold
        return rejected

    def describe(self) -> str:
        """One line for people."""
        if not self.n_negatives:
            return "nothing is rejected: no validation image was answered wrongly (unknown=FOLDER gives others)"
        return (
            f"below {confidence_words(self.threshold)} confidence at temperature {self.temperature:.2f}: of "
            f"{self.n_negatives} {self.negatives} {100 * self.false_accept:.1f} % pass (at most "
            f"{100 * self.max_false_accept:g} % were asked for), of right answers {100 * self.accepted:.1f} %"
        )

    def metrics(self) -> dict[str, float]:
        """Figures as they are logged, shares between 0 and 1."""
        return {
            "rejection/temperature": self.temperature,
            "rejection/threshold": self.threshold,
            "rejection/false_accept": self.false_accept,
            "rejection/accepted": self.accepted,
            "rejection/n_negatives": float(self.n_negatives),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them."""
        return {**dataclasses.asdict(self), "curve": [list(point) for point in self.curve]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rejection:
        """Read what `to_dict` wrote."""
        curve = tuple((float(t), float(a), float(f)) for t, a, f in data["curve"])
        return cls(**{**data, "curve": curve})


def confidence_words(threshold: float) -> str:
    """A threshold with three decimals, or as many as it takes not to be 1 where it is less."""
    texts = (f"{threshold:.{n}f}" for n in range(3, 17))
    return next((text for text in texts if float(text) < 1), f"{threshold:.3f}")


def confidence_of(probabilities: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Largest probability (n,) at a temperature, of probabilities (n, n_classes) at temperature 1."""
    p = np.asarray(probabilities, np.float64)
    shares: NDArray[np.float64] = (p / p.max(axis=1, keepdims=True)) ** (1 / temperature)
    confidence: NDArray[np.float64] = 1 / shares.sum(axis=1)
    return confidence


def fit_temperature(logits: NDArray[Any], targets: NDArray[np.integer[Any]]) -> float:
    """The temperature with the least cross-entropy: logits (n, n_classes), right classes (n,).

    The cross-entropy is convex in the temperature's inverse, so a golden-section search finds it.
    """
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=1, keepdims=True)
    right = z[np.arange(len(z)), targets]

    def loss(inverse: float) -> float:
        return float(np.mean(np.log(np.exp(z * inverse).sum(axis=1)) - right * inverse))

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(_STEPS):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) <= loss(b) else (a, high)
    return 2 / (low + high)


def fit_rejection(
    logits: NDArray[Any],
    targets: NDArray[np.integer[Any]],
    *,
    max_false_accept: float,
    unknown: NDArray[Any] | None = None,
) -> Rejection:
    """Choose temperature and threshold.

    Args:
        logits: Of the validation images, (n, n_classes).
        targets: Their classes, (n,).
        max_false_accept: Share of negatives that may be accepted, in (0, 1).
        unknown: Logits of images that are none of the classes, (m, n_classes); None: wrong answers stand for them.

    Raises:
        InvalidInputError: If there is nothing to choose on.
    """
    if not len(logits):
        raise InvalidInputError("a threshold is chosen on validation images", received="none")
    if not 0 < max_false_accept < 1:
        raise InvalidInputError("max_false_accept must be between 0 and 1", received=max_false_accept)
    temperature = fit_temperature(logits, targets)
    right = np.argmax(logits, axis=1) == targets
    confident = _confidence(logits, temperature)
    positives = confident[right]
    negatives = confident[~right] if unknown is None else _confidence(unknown, temperature)
    threshold = _threshold(positives, negatives, max_false_accept)
    kind = "wrong answers" if unknown is None else "unknown images"

    def shares(t: float) -> tuple[float, float]:
        accepted = float(np.mean(positives >= t)) if len(positives) else 0.0
        return accepted, float(np.mean(negatives >= t)) if len(negatives) else 0.0

    accepted, false_accept = shares(threshold)
    curve = tuple((float(t), *shares(float(t))) for t in np.linspace(0, 1, _CURVE_POINTS))
    return Rejection(temperature, threshold, max_false_accept, kind, len(negatives), false_accept, accepted, curve)


def _confidence(logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    z = np.asarray(logits, np.float64)
    confidence: NDArray[np.float64] = 1 / np.exp((z - z.max(axis=1, keepdims=True)) / temperature).sum(axis=1)
    return confidence


def _threshold(positives: NDArray[np.float64], negatives: NDArray[np.float64], max_false_accept: float) -> float:
    """The smallest that lets at most that share of negatives pass, between two confidences that were seen."""
    n_allowed = math.floor(max_false_accept * len(negatives))
    if len(negatives) <= n_allowed:
        return 0.0
    highest = float(np.sort(negatives)[::-1][n_allowed])
    every = np.concatenate([positives, negatives])
    above = every[every > highest]
    # In the middle: confidences of a server, of float32 probabilities, differ in their last digits.
    return (highest + float(above.min() if len(above) else max(1.0, highest))) / 2 if highest < 1 else 1.0 + 1e-9
