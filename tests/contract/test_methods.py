"""What every method under conf/method must keep, found by glob: it starts as the base and trains only what it says."""

import pytest
import torch

from dsft.data.batch import build_batch
from dsft.data.open import Dataset
from dsft.engine.assemble import Session
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step
from tests.contract.sessions import METHODS, session_of, text_of


def _loss(session: Session, data: Dataset) -> float:
    session.model.eval()
    batch = build_batch(data.train, [0, 1, 2])
    with torch.no_grad():
        return float(session.run.objective.losses(session.scorer, batch)[0])


@pytest.mark.parametrize("method", METHODS)
def test_starts_as_the_base_or_says_that_it_does_not(method: str) -> None:
    session, data = session_of(method)
    quantization = {"qlora": "nf4", "int8_lora": "int8"}.get(method, "none")
    base, _ = session_of("lora", f"quantization={quantization}", "method.target_modules=q_proj", "method.rank=1")
    same = _loss(session, data) == pytest.approx(_loss(base, data), rel=1e-6)  # B = 0 in the base's own adapter
    assert same == session.run.method.starts_as_base


@pytest.mark.parametrize("method", METHODS)
def test_moves_what_it_declares_and_nothing_else(method: str) -> None:
    session, data = session_of(method)
    before = {name: param.detach().clone() for name, param in session.model.named_parameters()}
    for step in (1, 2):
        assert train_step(session, step_batches(session, data, step)[1], step, 1.0).moved
    moved = {name for name, param in session.model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == {name for name, param in session.model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same_with_recomputation_and_dropout(method: str) -> None:
    dropout = ["method.dropout=0.5"] if "dropout:" in _text(method) else []
    norms = []
    for again in ("none", "full", "selective"):
        session, data = session_of(method, f"train.gradient_checkpointing={again}", *dropout)
        results = [train_step(session, step_batches(session, data, s)[1], s, 1.0) for s in (1, 2)]
        norms.append([(result.loss, result.grad_norm) for result in results])
    assert _close(norms)


def _close(norms: list[list[tuple[float, float]]]) -> bool:
    flat = [[value for pair in run for value in pair] for run in norms]
    return all(a == pytest.approx(b, rel=1e-5) for other in flat[1:] for a, b in zip(other, flat[0], strict=True))


def _text(method: str) -> str:
    text = text_of(method)
    return text + text_of("lora") if "/method/lora" in text else text


@pytest.mark.parametrize("method", METHODS)
def test_packed_equals_one_example_at_a_time(method: str) -> None:
    results = []
    for budget, micro_batches in ((1, 4), (4000, 1)):
        session, data = session_of(method, f"train.micro_batch_tokens={budget}")
        batches = step_batches(session, data, 1)[1]
        assert len(batches) == micro_batches
        result = train_step(session, batches, 1, 1.0)
        results.append((result.loss, result.grad_norm))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
