"""The generator of dropout's masks: the same bits however it is asked, and as even as chance."""

import math

import pytest
import torch
from torch import Tensor

from dsft.engine import masks
from dsft.engine.masks import HALF, columns_of, halves, kept, rows_of, stream, threshold, words

TOKENS, WIDTH, P = 512, 512, 0.1

WORDS = [1057762636, 1887518746, 1133183137, 1912535462, -627454723]
HALVES = (-1717969259, 487990771)
MASK = [[1, 0, 0, 1, 0, 1, 0, 1], [1, 1, 0, 0, 1, 1, 1, 0]]


def rows(*example: object) -> Tensor:
    key = torch.tensor(halves(stream(*example)), dtype=torch.int32)
    return rows_of(key[:, None].expand(2, TOKENS), torch.arange(TOKENS, dtype=torch.int32))


def mask(example: str = "example", module: str = "module", p: float = P, width: int = WIDTH) -> Tensor:
    return kept(rows(example), columns_of(stream(module), width), width, threshold(p))


def test_the_words_are_the_known_ones() -> None:
    """Other bits would give every run with dropout other losses: they change with a line in the changelog alone."""
    counter = torch.tensor([0, 1, 2, -1, 2**31 - 1], dtype=torch.int32)
    key, more = (torch.tensor(number, dtype=torch.int32) for number in (12345, -67890))
    assert words(key, more, counter).tolist() == WORDS
    assert halves(stream(0, 1, "a")) == HALVES
    assert mask(width=8, p=0.5)[:2].int().tolist() == MASK


def test_a_part_is_what_it_is_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, all_rows, columns = mask(), rows("example"), columns_of(stream("module"), WIDTH)
    monkeypatch.setattr(masks, "AT_ONCE", 3 * WIDTH)
    assert torch.equal(kept(all_rows, columns, WIDTH, threshold(P)), whole)
    assert torch.equal(kept(all_rows[:, 7:9], columns, WIDTH, threshold(P)), whole[7:9])
    assert torch.equal(mask(width=3), whole[:, :3])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 1 - 1e-6])
def test_as_many_entries_stay_as_are_scaled_for(p: float) -> None:
    stays, count = 1 - threshold(p) / HALF, TOKENS * WIDTH
    assert 0 < stays < 1
    assert abs(1 - p - stays) <= 1 / HALF
    assert abs(int(mask(p=p).sum()) - count * stays) < 5 * math.sqrt(count * stays * (1 - stays)) + 1


def test_neighbours_do_not_know_each_other() -> None:
    """Entries that both go, of pairs that are near in one respect, are as many as by chance: within 5 deviations."""
    gone = ~mask()
    pairs = {
        "positions": (gone[1:], gone[:-1]),
        "features": (gone[:, 1:], gone[:, :-1]),
        "words": (gone[:, 2:], gone[:, :-2]),
        "diagonal": (gone[1:, 1:], gone[:-1, :-1]),
        "modules": (gone, ~mask(module="module2")),
        "examples": (gone, ~mask(example="example2")),
    }
    both = (threshold(P) / HALF) ** 2
    for name, (one, other) in pairs.items():
        spread = math.sqrt(one.numel() * both * (1 - both) * 1.2)  # pairs of a chain share entries
        assert abs(int((one & other).sum()) - one.numel() * both) < 5 * spread, name
    for axis in (0, 1):  # no row or column goes more often than others: chi-square over its 511 degrees of freedom
        counts, p = gone.sum(axis).double(), threshold(P) / HALF
        chi = float(((counts - TOKENS * p) ** 2 / (TOKENS * p * (1 - p))).sum())
        assert abs(chi - WIDTH) < 5 * math.sqrt(2 * WIDTH)
