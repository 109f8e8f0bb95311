"""What is said of logits that are not those of the live model, and of choices of experts that are not its own."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsft.compared import BEYOND, BOUNDS, judged
from dsft.models.routing import Compared, OtherChoicesError, Recorded

LIVE = torch.linspace(-1, 1, 64 * 5).view(1, 64, 5)  # largest logit 1


def _moved(*places: int, by: float = 0.5) -> Tensor:
    logits = LIVE.clone()
    logits[0, list(places)] += by
    return logits


def _never() -> Iterator[Tensor]:
    raise AssertionError("nothing is computed again where the bound holds")
    yield


def test_within_the_bound_it_is_the_model() -> None:
    found = judged(LIVE, _moved(3, by=0.04), BOUNDS["bf16"], _never())
    assert (found["same"], found["different"]) == (True, None)
    assert found["logits_off"] == pytest.approx(0.04)


def test_one_position_is_too_many() -> None:
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
def test_a_position_may_be_off_where_rounding_moves_it(read, again, beyond: int) -> None:
    moved = _moved(*read)
    others = moved.clone()
    others[0, list(again)] -= 0.4
    found = judged(LIVE, moved, BOUNDS["bf16"], iter([moved, others]))
    assert found["beyond"] == beyond
    assert found["same"] is (beyond <= len(LIVE[0]) // BEYOND)
    assert (found["different"] is None) is found["same"]


def _recorded(scores: Tensor, count: int = 2) -> dict[str, Tensor]:
    recorded = Recorded()
    with recorded:
        torch.topk(scores, count)
    return recorded.as_tensors()


def test_choices_are_taken_and_scores_compared() -> None:
    """One of eight rows chose another expert by rounding; a pass that is rounded otherwise says how much it does."""
    scores = torch.arange(4.0).repeat(8, 1)
    live = scores.clone()
    live[5, 1:3] = torch.tensor([2.01, 2.0])
    routed = Compared(_recorded(live))
    with routed:
        found = scores.topk(2)
    assert found.indices.tolist() == [[3, 2]] * 5 + [[3, 1]] + [[3, 2]] * 2
    assert found.values.tolist() == found.indices.float().tolist()
    assert (routed.off, routed.moved) == (pytest.approx(1.01 / 3), 0.0)
    with routed:
        (scores + 0.3).topk(2)
    assert (routed.off, routed.moved) == (pytest.approx(1.01 / 3), pytest.approx(0.1))


def test_scores_that_are_no_numbers_are_seen_and_those_left_out_are_not() -> None:
    none = torch.full((8, 4), float("inf"))
    with Compared(_recorded(none)) as routed:
        none.topk(2)
    assert routed.off == 0
    with Compared(_recorded(torch.rand(8, 4))) as routed:
        torch.full((8, 4), float("nan")).topk(2)
    assert routed.off == float("inf")


def test_a_choice_in_a_vector_or_along_rows_is_each_process_s_own() -> None:
    recorded = Recorded()
    with recorded:
        torch.rand(5).topk(2, dim=0)
        torch.rand(4, 5).topk(2, dim=0)
    assert recorded.as_tensors() == {}
    scores = torch.rand(4, 5)
    with Compared({}):
        assert torch.equal(scores.topk(2, dim=0).values, scores.sort(0, descending=True).values[:2])


def test_a_process_that_chooses_otherwise_is_told() -> None:
    with pytest.raises(OtherChoicesError, match="choice 1 is of shape"), Compared(_recorded(torch.rand(8, 4))):
        torch.topk(torch.rand(8, 4), 3)
    with pytest.raises(OtherChoicesError, match="it chooses more than 0 times"), Compared({}):
        torch.rand(8, 4).topk(2, dim=-1)
    with pytest.raises(OtherChoicesError, match="it chooses 0 times, and chose 1 times"):
        with Compared(_recorded(torch.rand(8, 4))):
            pass
