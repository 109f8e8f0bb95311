"""What is said of logits that are not those of the live model, and of choices of experts that are not its own."""

import pytest
import torch
from torch import Tensor

from dsft.compared import BOUNDS, judged
from dsft.models.routing import Compared

LIVE = torch.linspace(-1, 1, 64 * 5).view(1, 64, 5)  # largest logit 1


def _moved(*places: int, by: float = 0.5) -> Tensor:
    logits = LIVE.clone()
    logits[0, list(places)] += by
    return logits


def test_within_the_bound_it_is_the_model() -> None:
    found = judged(LIVE, _moved(3, by=0.04), BOUNDS["bf16"])
    assert (found["same"], found["different"]) == (True, None)
    assert found["logits_off"] == pytest.approx(0.04)


def test_one_position_is_too_many() -> None:
    found = judged(LIVE, _moved(3), BOUNDS["bf16"])
    assert found["same"] is False
    assert found["different"] == "other logits: logits_off 0.5, bound 0.05"


def test_choices_are_taken_behind_a_soft_prompt_and_told_apart() -> None:
    """Two of ten rows stand before the tokens; of the eight behind them, one has chosen another expert."""
    scores = torch.arange(4.0).expand(10, 4)
    kept = torch.tensor([3, 2]).expand(8, 2).clone()
    kept[5] = torch.tensor([1, 3])
    routed = Compared([kept])
    with routed:
        found = scores.topk(2)
    assert found.indices.tolist() == [[3, 2]] * 7 + [[1, 3]] + [[3, 2]] * 2
    assert found.values.tolist() == found.indices.float().tolist()
    assert routed.short == pytest.approx((2 - 1) / 3)


def test_a_process_that_chooses_otherwise_often_is_told() -> None:
    with Compared([torch.zeros(8, 2, dtype=torch.long)]), pytest.raises(ValueError, match="choice 1 is of shape"):
        torch.topk(torch.rand(8, 4), 3)
    with Compared([]), pytest.raises(ValueError, match="it chooses more than 0 times"):
        torch.rand(8, 4).topk(2, dim=-1)
