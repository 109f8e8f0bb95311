"""Diff pruning's gates, its choice of what is kept, and its course over the steps."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from dsft.methods.hard_concrete import DIFF, FIXED, GATE, GROUP, Gates, Noise, _Sum, draw
from dsft.methods.pruner import Best, Entries, Pruner, open_share

INTERVAL = (-1.5, 1.5)


def test_at_the_start_the_papers_share_of_gates_is_expected_open() -> None:
    assert float(open_share(torch.tensor(5.0), INTERVAL)) == pytest.approx(0.99331, abs=5e-6)
    assert float(open_share(torch.tensor(5.0), (-0.1, 1.1))) == pytest.approx(1 / (1 + math.exp(math.log(1 / 11) - 5)))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 2.0])
def test_as_many_gates_are_open_as_expected_and_mass_lies_at_both_ends(alpha: float) -> None:
    count = 200_000
    gates = Gates(*INTERVAL, (0, 1, "name"))
    z, slope = gates(torch.full((count,), alpha), GATE)
    share = 1 / (1 + math.exp(-alpha))
    five_sigma = 5 * math.sqrt(share * (1 - share) / count) + 1e-4  # the noise ends 1e-4 before 0 and 1
    assert float((z > 0).float().mean()) == pytest.approx(share, abs=five_sigma)
    closed, opened = z == 0, z == 1
    assert closed.any()
    assert opened.any()
    assert ((z >= 0) & (z <= 1)).all()
    assert (slope[closed | opened] == 0).all()
    assert (slope[~(closed | opened)] > 0).all()


@pytest.mark.parametrize("alpha", [FIXED, FIXED - 20, float(torch.tensor(FIXED).bfloat16())])
def test_fixed_gates_are_one_or_zero_to_the_bit_whatever_the_noise(alpha: float) -> None:
    for noise in (None, (0, 3, "name")):
        for sign, value in ((1, 1.0), (-1, 0.0)):
            z, slope = Gates(*INTERVAL, noise)(torch.full((10_000,), sign * alpha), GATE)
            assert (z == value).all()
            assert (slope == 0).all()


def test_noise_is_a_function_of_its_words_and_touches_no_stream() -> None:
    like = torch.empty(64, 3)
    before = torch.get_rng_state()
    drawn = draw((0, 1, "a", GATE), like)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(draw((0, 1, "a", GATE), like), drawn)
    for words in ((1, 1, "a", GATE), (0, 2, "a", GATE), (0, 1, "b", GATE), (0, 1, "a", GROUP)):
        assert not torch.equal(draw(words, like), drawn)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("noise", [None, (0, 4, "name")], ids=["still", "noisy"])
def test_gradients_are_those_of_the_formula(structured: bool, noise: tuple[int, int, str] | None) -> None:
    torch.manual_seed(0)
    base = torch.randn(40, 30, dtype=torch.float64)
    wanted = [torch.randn(40, 30), torch.randn(40, 30), *([torch.tensor([0.3])] if structured else [])]
    ours = [value.clone().requires_grad_() for value in wanted]
    theirs = [value.double().requires_grad_() for value in wanted]
    theta = _Sum.apply(base.float(), ours[0], ours[1], ours[2] if structured else None, Gates(*INTERVAL, noise))
    z: Any = 1.0
    for alpha, what in zip(theirs[1:], (GATE, GROUP), strict=False):
        u = draw((*noise, what), alpha).double() if noise else torch.full_like(alpha, 0.5)
        z = z * (torch.sigmoid(u.log() - (1 - u).log() + alpha) * 3 - 1.5).clamp(0, 1)
    expected = base + z * theirs[0]
    weights = torch.randn(40, 30, dtype=torch.float64)
    (theta * weights.float()).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(theta.double(), expected, rtol=0, atol=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-5)  # fp32 against fp64


@pytest.mark.parametrize("sizes", [(97,), (1, 50, 3, 43), (10,) * 9 + (7,)], ids=str)
@pytest.mark.parametrize("count", [1, 13, 60, 97])
def test_the_largest_are_chosen_exactly_and_of_equal_ones_the_first(sizes: tuple[int, ...], count: int) -> None:
    values = torch.randint(0, 9, (97,), generator=torch.Generator().manual_seed(0)).float()
    best = Best(count, torch.device("cpu"))
    for part in values.split(list(sizes)):
        best.look(part)
    expected = torch.zeros(97, dtype=torch.bool)
    expected[torch.sort(values, descending=True, stable=True).indices[:count]] = True
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    found = torch.cat([best.among(start, size) for start, size in zip(starts, sizes, strict=True)])
    assert torch.equal(found, expected)
    assert int(found.sum()) == count


def pruner(last: int) -> tuple[Pruner, dict[str, Tensor]]:
    tensors = [Entries(f"{name}{DIFF}", f"{name}{GATE}", f"{name}{GROUP}", 12) for name in "ab"]
    noise = Noise(seed=0, step=0, quiet=False)
    course = Pruner(tensors, noise, INTERVAL, torch.device("cpu"), weight=0.1, count=5, last=last)
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(1 if name.endswith(GROUP) else (3, 4), generator=generator).view(-1) for name in course.names
    }
    return course, values


def after(course: Pruner, step: int, values: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """What the engine does once a step has moved."""
    changed: dict[str, Tensor] = {}
    for names in course.after(step):
        changed |= course.after_step(step, {name: values[name] for name in names}, {})
    return changed


def test_a_pruning_that_fell_on_a_skipped_step_is_made_up_for_and_made_once() -> None:
    course, values = pruner(last=3)
    assert not after(course, 2, values)
    changed = after(course, 5, values)  # 3 and 4 did not move
    kept = [int((value > 0).sum()) for name, value in changed.items() if name.endswith(GATE)]
    assert sum(kept) == 5
    assert course.news() == ("pruned", {"kept": 5, "of": 24, "tensors": sum(count > 0 for count in kept)})
    assert course.news() is None
    assert not after(course, 6, values)
    assert not [*course.before(6)]
    course.begin_step(7)
    assert course.noise.quiet


def test_the_penalty_counts_each_gate_once() -> None:
    course, values = pruner(last=3)
    asked = (course.penalty({name: values[name] for name in names}) for names in course.before(1))
    found = torch.stack([part for part in asked if part is not None]).sum()
    gates = torch.cat([value for name, value in values.items() if not name.endswith(DIFF)])
    assert len(gates) == 2 * 12 + 2
    torch.testing.assert_close(found, 0.1 * gates.sigmoid().sum())
