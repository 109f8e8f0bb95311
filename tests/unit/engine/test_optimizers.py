"""The rate at a step, and the optimizers by name."""

from dataclasses import replace

import pytest
import torch

from dsft.compose import compose
from dsft.config import Optim
from dsft.engine.optimizers import factory, rate
from dsft.strategies.update import Update


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


def test_a_paged_optimizer_that_goes_on_has_paged_memory(optim: Optim, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim import optimizer as bnb

    def managed(self: object, param: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        buffer = torch.zeros_like(param, dtype=dtype)
        buffer.is_paged = True  # type: ignore[attr-defined]
        return buffer

    monkeypatch.setattr(bnb.Optimizer8bit, "get_state_buffer", managed)
    monkeypatch.setattr(bnb.F, "prefetch_tensor", lambda value: None)
    gradients = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))

    def fresh() -> tuple[torch.nn.Parameter, Update]:
        weight = torch.nn.Parameter(torch.full((64, 64), 2.0))
        group = {"params": [weight], "param_names": ["w"], "lr": 0.05}
        return weight, Update([group], factory(replace(optim, name="paged_adamw8bit", lr=0.05)))

    def move(weight: torch.nn.Parameter, update: Update, index: int) -> None:
        weight.grad = gradients[index].clone()
        update.step(1e9, 1.0)

    unbroken, broken = fresh(), fresh()
    for index in range(2):
        move(*unbroken, index)
        move(*broken, index)
    saved = {key: value.clone() for key, value in broken[1].state().items()}
    weight, update = fresh()
    template = update.template({key: (value.shape, value.dtype) for key, value in saved.items()})
    assert not update.optimizer.state, "nothing is taken over before it is known to be whole"
    for key, value in template.items():
        value.copy_(saved[key])
    update.restore(template)
    assert all(update.optimizer.state[weight][name].is_paged for name in ("state1", "state2"))
    move(*unbroken, 2)
    move(weight, update, 2)
    assert torch.equal(weight, unbroken[0])
