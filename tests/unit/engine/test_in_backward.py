"""Parameters that move in backward end where those end that move after it, and their gradients are gone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsft.comm.world import World
from dsft.compose import compose
from dsft.data.open import Dataset, open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.loop import step_batches
from dsft.engine.step import StepResult, train_step

IN_BACKWARD = "optim.in_backward=true"


def made(*words: str) -> tuple[Session, Dataset]:
    run = compose([
        "model=tiny", "data=reasoning_gym", "data.size=32", "data.eval_size=0", "train.precision=fp32", "tracker=[]",
        "train.global_batch_size=4", "train.steps=6", "launcher=local", "optim.lr=1e-3", "train.max_grad_norm=inf",
        "optim.weight_decay=0.1", *words,
    ]).run  # fmt: skip
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=512, seed=0)
    return assemble(run, files, World(0, 1, 0, torch.device("cpu"))), data


def trained(session: Session, data: Dataset, steps: range) -> list[StepResult]:
    return [train_step(session, step_batches(session, data, step)[1], step, 1 / step) for step in steps]


def state(session: Session) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in session.run.strategy.export_state().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tokens", [2048, 100], ids=["one micro-batch", "several"])
@pytest.mark.parametrize(
    "words",
    [
        ["method=full"],
        ["method=lora"],
        ["method=full", "train.gradient_checkpointing=full"],
        ["method=full", "optim.name=sgd"],
        ["method=full", "optim.name=paged_adamw8bit"],
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_it_ends_in_the_same_bits(words: list[str], tokens: int) -> None:
    ends = []
    for more in ([], [IN_BACKWARD]):
        session, data = made(*words, f"train.micro_batch_tokens={tokens}", *more)
        assert (len(step_batches(session, data, 1)[1]) > 1) is (tokens == 100)
        results = trained(session, data, range(1, 5))
        ends.append((results, state(session)))
    (results, plain), (others, released) = ends
    assert results == others
    assert same(plain, released)


def test_a_resumed_run_goes_on_in_the_same_bits() -> None:
    whole, data = made("method=full")
    trained(whole, data, range(1, 5))
    first, _ = made("method=full", IN_BACKWARD)
    trained(first, data, range(1, 3))
    saved = state(first)
    second, _ = made("method=full", IN_BACKWARD)
    template = second.run.strategy.state_template({name: (value.shape, value.dtype) for name, value in saved.items()})
    for name, value in saved.items():
        template[name].copy_(value)
    second.run.strategy.import_state(template)
    trained(second, data, range(3, 5))
    assert same(state(second), state(whole))


def test_no_two_gradients_are_there_at_a_time() -> None:
    session, data = made("method=full", IN_BACKWARD)
    params = [param for param in session.model.parameters() if param.requires_grad]
    there: list[int] = []

    def count(_: Any) -> None:
        there.append(sum(param.grad is not None for param in params))

    for param in params:
        param.register_post_accumulate_grad_hook(count)  # before the one that moves
    trained(session, data, range(1, 2))
    assert there == [1] * len(params)
    assert all(param.grad is None for param in params)


def test_a_save_is_settled_before_anything_moves() -> None:
    session, data = made("method=full", IN_BACKWARD)
    before = state(session)
    seen: list[bool] = []
    batches = step_batches(session, data, 1)[1]
    train_step(session, batches, 1, 1.0, settle=lambda: seen.append(same(before, state(session))))
    assert seen[0]
    assert not same(before, state(session))


def test_a_parameter_that_only_an_earlier_micro_batch_used_moves_too() -> None:
    ends = []
    for more in ([], [IN_BACKWARD]):
        session, _ = made("method=lora", *more)
        strategy: Any = session.run.strategy
        params = strategy.update.params
        sum((param * param + param).sum() for param in params).backward()
        if more:
            strategy.release(1.0)
        strategy.backward(sum((param * 2).sum() for param in params[::2]), last=True)
        norm = strategy.step(math.inf, 1.0)
        ends.append((norm, state(session)))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])
