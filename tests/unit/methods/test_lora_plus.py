"""LoRA+: B moves lr_ratio times as fast as A, and one process's numbers are those of any update."""

import pytest
import torch

from dsft.data.open import open_data
from dsft.engine.assemble import Session
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step
from tests.contract.sessions import session_of


def trained(*words: str, steps: int = 1) -> tuple[Session, dict[str, torch.Tensor], list[float]]:
    """A session after so many steps, what it started from, and its losses."""
    session, data = session_of("lora_plus", "train.steps=4", "train.max_grad_norm=inf", *words)
    start = {name: p.detach().clone() for name, p in session.model.named_parameters() if p.requires_grad}
    losses = [train_step(session, step_batches(session, data, s)[1], s, 1.0).loss for s in range(1, steps + 1)]
    return session, start, losses


def test_after_one_step_of_sgd_b_has_moved_by_the_ratio() -> None:
    moves = []
    for ratio in (1, 16):
        session, start, _ = trained(f"method.lr_ratio={ratio}", "optim.name=sgd")
        moves.append({n: p.detach() - start[n] for n, p in session.model.named_parameters() if n in start})
    for name, move in moves[1].items():
        factor = 16 if ".lora_B." in name else 1
        torch.testing.assert_close(move, factor * moves[0][name], rtol=1e-5, atol=1e-7)
    assert any(move.norm() > 0 for name, move in moves[1].items() if ".lora_B." in name)


def test_the_schedule_scales_both_rates() -> None:
    session, _, _ = trained()
    session.run.strategy.step(1.0, 0.5)
    rates = [group["lr"] for group in session.run.strategy.update.optimizer.param_groups]
    assert rates == pytest.approx([0.5e-3, 8e-3])


def test_moving_in_backward_changes_nothing() -> None:
    assert trained(steps=3)[2] == trained("optim.in_backward=true", steps=3)[2]


def test_a_state_goes_on_where_it_was_left() -> None:
    session, _, _ = trained(steps=2)
    state = {key: value.clone() for key, value in session.run.strategy.export_state().items()}
    other, _, _ = trained(steps=1)
    template = other.run.strategy.state_template({key: (v.shape, v.dtype) for key, v in state.items()})
    for key, value in template.items():
        value.copy_(state[key])
    other.run.strategy.import_state(template)
    assert _next(session) == _next(other)


def _next(session: Session) -> list[float]:
    data = open_data(session.run.data, session.files.tokenizer(), max_length=512, seed=0)
    return [train_step(session, step_batches(session, data, s)[1], s, 1.0).loss for s in (3, 4)]
