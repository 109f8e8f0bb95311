"""What is said of logits that are not those of the live model: rounding moves a position, a fault more of them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsft.compared import BEYOND, BOUNDS, judged

LIVE = torch.linspace(-1, 1, 64 * 5).view(1, 64, 5)  # largest logit 1


def _moved(*places: int, by: float = 0.5) -> Tensor:
    logits = LIVE.clone()
    logits[0, list(places)] += by
    return logits


def _never() -> Iterator[Tensor]:
    raise AssertionError("nothing is computed again where the bound holds")
    yield


def test_within_the_bound_nothing_is_computed_again() -> None:
    found = judged(LIVE, _moved(3, by=0.04), BOUNDS["bf16"], _never())
    assert (found["same"], found["different"]) == (True, None)
    assert found["logits_off"] == pytest.approx(0.04)


def test_without_experts_one_position_is_too_many() -> None:
    found = judged(LIVE, _moved(3), BOUNDS["bf16"], iter(()))
    assert found["same"] is False
    assert found["different"] == "other logits: logits_off 0.5, bound 0.05"


@pytest.mark.parametrize(
    ("read", "again", "beyond"),
    [
        ((3, 9, 11), (3, 9, 11), 0),
        ((3, 9, 11), (3,), 2),
        ((3, 9, 11), (4, 5), 3),
        (range(12), range(32, 64), 12),
    ],
)
def test_with_experts_a_position_may_be_off_where_rounding_moves_it(read, again, beyond: int) -> None:
    moved = _moved(*read)
    others = moved.clone()
    others[0, list(again)] -= 0.4
    found = judged(LIVE, moved, BOUNDS["bf16"], iter([moved, others]))
    assert found["beyond"] == beyond
    assert found["same"] is (beyond <= len(LIVE[0]) // BEYOND)
    assert (found["different"] is None) is found["same"]
