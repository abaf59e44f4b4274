"""Temperature and threshold of "none of these": against brute force, on answers of which everything is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.rejection import Rejection, confidence_of, fit_rejection, fit_temperature


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    z = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    return z / z.sum(axis=1, keepdims=True)


@pytest.fixture
def answers(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are twice as sure as they should be, and right classes drawn as the calm ones say."""
    calm = rng.normal(0, 2, (4000, 6))
    targets = np.array([rng.choice(6, p=p) for p in softmax(calm)])
    return 2 * calm, targets


def test_the_temperature_undoes_too_much_confidence(answers: tuple[np.ndarray, np.ndarray]) -> None:
    logits, targets = answers
    found = fit_temperature(logits, targets)
    assert found == pytest.approx(2, rel=0.08)

    def loss(temperature: float) -> float:
        return float(-np.mean(np.log(softmax(logits, temperature)[np.arange(len(targets)), targets])))

    tried = np.geomspace(0.5, 8, 400)
    assert loss(found) <= min(map(loss, tried)) + 1e-9


def test_confidence_of_probabilities_is_that_of_the_logits(answers: tuple[np.ndarray, np.ndarray]) -> None:
    logits, _ = answers
    for temperature in (0.7, 1.0, 3.0):
        expected = softmax(logits, temperature).max(axis=1)
        np.testing.assert_allclose(confidence_of(softmax(logits), temperature), expected, rtol=1e-9)


@pytest.mark.parametrize("max_false_accept", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("known", [True, False])
def test_the_threshold_is_the_smallest_that_keeps_the_promise(
    answers: tuple[np.ndarray, np.ndarray], rng: np.random.Generator, max_false_accept: float, known: bool
) -> None:
    logits, targets = answers
    unknown = rng.normal(0, 2, (333, 6)) if known else None
    found = fit_rejection(logits, targets, max_false_accept=max_false_accept, unknown=unknown)
    right = logits.argmax(axis=1) == targets
    negatives = softmax(logits[~right] if unknown is None else unknown, found.temperature).max(axis=1)
    positives = softmax(logits[right], found.temperature).max(axis=1)
    assert found.n_negatives == len(negatives)
    assert found.false_accept == np.mean(negatives >= found.threshold) <= max_false_accept
    assert found.accepted == np.mean(positives >= found.threshold)
    # Every smaller one that lets something more pass breaks it.
    lower = np.unique(negatives[negatives < found.threshold])[-1]
    assert np.mean(negatives >= lower) > max_false_accept
    served = found.rejects(softmax(logits).astype(np.float32))
    np.testing.assert_array_equal(served, softmax(logits, found.temperature).max(axis=1) < found.threshold)


def test_nothing_is_rejected_where_nothing_was_wrong_and_all_where_the_unknown_is_certain() -> None:
    logits, targets = 9 * np.eye(3), np.arange(3)
    nothing = fit_rejection(logits, targets, max_false_accept=0.05)
    assert (nothing.threshold, nothing.n_negatives) == (0.0, 0)
    assert not nothing.rejects(softmax(logits)).any()
    certain = fit_rejection(logits, targets, max_false_accept=0.05, unknown=1e6 * np.eye(3))
    assert certain.rejects(softmax(1e6 * np.eye(3))).all()
    assert certain.false_accept == 0
    with pytest.raises(InvalidInputError, match="validation images"):
        fit_rejection(logits[:0], targets[:0], max_false_accept=0.05)


@pytest.mark.parametrize(("threshold", "told"), [(0.7594, "0.759"), (0.99998, "0.99998"), (1 + 1e-9, "1.000")])
def test_a_threshold_below_certainty_is_not_told_as_certainty(threshold: float, told: str) -> None:
    rejection = Rejection(1.0, threshold, 0.05, "wrong answers", 4, 0.0, 0.9)
    assert rejection.describe().startswith(f"below {told} confidence")


def test_a_rejection_is_json_and_reads_itself(answers: tuple[np.ndarray, np.ndarray]) -> None:
    found = fit_rejection(*answers, max_false_accept=0.1)
    assert Rejection.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    thresholds, accepted, false = np.array(found.curve).T
    assert (np.diff(thresholds) > 0).all()
    assert (np.diff(accepted) <= 0).all()
    assert (np.diff(false) <= 0).all()
