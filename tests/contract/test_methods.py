"""What every method under conf/method must keep, found by glob: it starts as the base and trains only what it says."""

from pathlib import Path

import pytest
import torch

from dsft.comm.world import World
from dsft.compose import OWN_CONF, compose
from dsft.data.batch import build_batch
from dsft.data.open import open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step

METHODS = sorted(path.stem for path in (OWN_CONF / "method").glob("*.yaml"))
ALONE = World(0, 1, 0, torch.device("cpu"))


def _session(method: str, *words: str) -> tuple[Session, object]:
    composed = compose([
        "model=tiny", "data=reasoning_gym", "data.size=32", "data.eval_size=0", "train.precision=fp32", "train.steps=3",
        "train.global_batch_size=4", "launcher=local", "optim.lr=1e-3", "optim.schedule=constant", f"method={method}",
        *words,
    ])  # fmt: skip
    files = composed.run.model.resolve()
    data = open_data(composed.run.data, files.tokenizer(), max_length=512, seed=0)
    return assemble(composed.run, files, ALONE), data


def _loss(session: Session, data: object) -> float:
    session.model.eval()
    batch = build_batch(data.train, [0, 1, 2])  # type: ignore[attr-defined]
    with torch.no_grad():
        return float(session.run.objective.loss(session.module, batch)[0])


@pytest.mark.parametrize("method", METHODS)
def test_starts_as_the_base(method: str) -> None:
    session, data = _session(method)
    quantization = "nf4" if method == "qlora" else "none"
    base, _ = _session("lora", f"quantization={quantization}", "method.target_modules=q_proj", "method.rank=1")
    assert _loss(session, data) == pytest.approx(_loss(base, data), rel=1e-6)  # B = 0 in the base's own adapter


@pytest.mark.parametrize("method", METHODS)
def test_moves_what_it_declares_and_nothing_else(method: str) -> None:
    session, data = _session(method)
    before = {name: param.detach().clone() for name, param in session.model.named_parameters()}
    for step in (1, 2):
        assert train_step(session, step_batches(session, data, step)[1], step, 1.0).moved  # type: ignore[arg-type]
    moved = {name for name, param in session.model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == {name for name, param in session.model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same_with_recomputation_and_dropout(method: str) -> None:
    dropout = ["method.dropout=0.5"] if "dropout:" in _text(method) else []
    norms = []
    for again in ("none", "full", "selective"):
        session, data = _session(method, f"train.gradient_checkpointing={again}", *dropout)
        results = [train_step(session, step_batches(session, data, s)[1], s, 1.0) for s in (1, 2)]  # type: ignore[arg-type]
        norms.append([(result.loss, result.grad_norm) for result in results])
    assert _close(norms)


def _close(norms: list[list[tuple[float, float]]]) -> bool:
    flat = [[value for pair in run for value in pair] for run in norms]
    return all(a == pytest.approx(b, rel=1e-5) for other in flat[1:] for a, b in zip(other, flat[0], strict=True))


def _text(method: str) -> str:
    text = (OWN_CONF / "method" / f"{method}.yaml").read_text()
    if "/method/lora" in text:
        text += Path(OWN_CONF / "method" / "lora.yaml").read_text()
    return text


@pytest.mark.parametrize("method", METHODS)
def test_packed_equals_one_example_at_a_time(method: str) -> None:
    results = []
    for budget, micro_batches in ((1, 4), (4000, 1)):
        session, data = _session(method, f"train.micro_batch_tokens={budget}")
        batches = step_batches(session, data, 1)[1]  # type: ignore[arg-type]
        assert len(batches) == micro_batches
        result = train_step(session, batches, 1, 1.0)
        results.append((result.loss, result.grad_norm))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
