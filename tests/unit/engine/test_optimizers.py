"""The rate at a step, and the optimizers by name."""

from dataclasses import replace

import pytest
import torch

from dsft.compose import compose
from dsft.config import Optim
from dsft.engine.optimizers import factory, rate


@pytest.fixture(scope="module")
def optim() -> Optim:
    return compose(["optim.lr=1e-3"]).run.optim


def test_linear_falls_from_1_to_just_above_the_floor(optim: Optim) -> None:
    rates = [rate(optim, step, 4) for step in (1, 2, 3, 4)]
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_warm_up_rises_evenly_and_never_starts_at_zero(optim: Optim) -> None:
    warm = replace(optim, warmup_steps=3, schedule="constant")
    assert [rate(warm, step, 10) for step in (1, 2, 3, 4, 10)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_is_half_way_in_the_middle(optim: Optim) -> None:
    cosine = replace(optim, schedule="cosine", min_lr_ratio=0.1)
    assert rate(cosine, 1, 100) == 1.0
    assert rate(cosine, 51, 100) == pytest.approx(0.55)
    assert rate(cosine, 100, 100) == pytest.approx(0.1, abs=1e-3)


def test_wsd_is_flat_until_its_decay(optim: Optim) -> None:
    wsd = replace(optim, schedule="wsd", decay_steps=4)
    assert [rate(wsd, step, 10) for step in (1, 6, 7, 8, 9, 10)] == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "paged_adamw8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_each_optimizer_descends(optim: Optim, name: str) -> None:
    weight = torch.nn.Parameter(torch.full((64, 64), 2.0))
    made = factory(replace(optim, name=name, lr=0.05))([{"params": [weight]}])  # type: ignore[arg-type]
    before = float((weight.detach() ** 2).sum())
    for _ in range(5):
        (weight**2).sum().backward()  # type: ignore[no-untyped-call]
        made.step()
        made.zero_grad()
    assert float((weight.detach() ** 2).sum()) < before
