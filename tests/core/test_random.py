"""Named streams of random numbers: no two alike, each the same again."""

from __future__ import annotations

import numpy as np

from foxnas_mlflow.core.random import Stream, listed_stream, pick, stream


def test_streams_differ_by_purpose_number_and_seed_and_repeat_themselves() -> None:
    keys = [(seed, purpose, numbers) for seed in (0, 1) for purpose in Stream for numbers in ((), (0,), (0, 0), (1,))]
    drawn = {stream(seed, purpose, *numbers).integers(2**63) for seed, purpose, numbers in keys}
    assert len(drawn) == len(keys)
    again = stream(1, Stream.DESIGN_CANDIDATES, 3)
    np.testing.assert_array_equal(stream(1, Stream.DESIGN_CANDIDATES, 3).random(5), again.random(5))
    # The reason for a key: lists of seeds are filled up with zeros.
    assert np.random.default_rng([0, 2]).integers(2**63) == np.random.default_rng([0, 2, 0]).integers(2**63)


def test_a_listed_stream_draws_what_a_list_of_seeds_always_drew() -> None:
    ours, theirs = listed_stream(5, Stream.TRAINED_SUBNETS, 7), np.random.default_rng([5, 3, 7])
    assert ours.integers(2**63) == theirs.integers(2**63)


def test_a_pick_is_numpys_choice() -> None:
    ours, theirs = stream(5, Stream.DESIGN_CANDIDATES), stream(5, Stream.DESIGN_CANDIDATES)
    for n in (1, 2, 3, 4, 7, 1000):
        values = range(100, 100 + n)
        for _ in range(50):
            assert pick(ours, values) == theirs.choice(values)
    assert ours.random() == theirs.random()
