"""Objectives learn what they are for from GSM8K, which lies beside the project: minutes each, `make slow`."""

from typing import Any

import pytest

from benchmarks.measure import GSM8K
from benchmarks.objectives import classes, pairs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3 * 3600),
    pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K is not beside this checkout"),
]


def test_dpo_ranks_held_out_pairs_better_than_their_length() -> None:
    """Three seeds, an hour: the mean is one standard error of the held-out rows above the rule."""
    told = list(pairs(None))
    assert told[-1].startswith("The mean is at least one standard error"), told


def test_a_classifier_tells_operators_apart() -> None:
    after: Any = list(classes(None))[-1]
    assert float(after.split("|")[3]) >= 0.8, after
