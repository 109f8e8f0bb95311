"""What every method under conf/method must leave: state that resumes to the bit, a result that others load as it is."""

import os
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsft.data.open import Dataset
from dsft.engine.assemble import Session
from dsft.engine.loop import step_batches
from dsft.engine.result import write_result
from dsft.engine.step import train_step
from dsft.export import merged
from dsft.loaded import load
from tests.contract.sessions import METHODS, session_of

ROUNDING = 1e-5
"""Of the largest logit: another attention and another order of sums, fp32."""


@pytest.mark.parametrize("method", METHODS)
def test_resumed_from_a_saved_state_it_ends_with_the_same_bits(method: str) -> None:
    unbroken, data = session_of(method)
    _train(unbroken, data, 1, 2, 3)
    first, _ = session_of(method)
    _train(first, data, 1, 2)
    state = {name: value.clone() for name, value in first.run.strategy.export_state().items()}
    second, _ = session_of(method)
    template = second.run.strategy.state_template({name: (value.shape, value.dtype) for name, value in state.items()})
    assert template.keys() == state.keys()
    for name, value in template.items():
        value.copy_(state[name])
    second.run.strategy.import_state(template)
    _train(second, data, 3)
    resumed = dict(second.model.named_parameters())
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.model.named_parameters())


@pytest.mark.parametrize(("method", "mask"), [("lora", 0o22), ("houlsby", 0o27), ("full", 0o27)])
def test_the_files_of_a_result_follow_the_umask(method: str, mask: int, tmp_path: Path) -> None:
    session, _ = session_of(method)
    before = os.umask(mask)
    try:
        write_result(session, tmp_path / "result")
    finally:
        os.umask(before)
    files = list((tmp_path / "result").iterdir())
    assert any(path.suffix == ".safetensors" for path in files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_read_back_as_the_model_that_was_trained(method: str, tmp_path: Path) -> None:
    session, data = session_of(method, "optim.lr=1e-2")
    _train(session, data, 1, 2)
    write_result(session, tmp_path / "result")
    tokens = torch.arange(40)[None] + 60
    expected = _logits(session, tokens)
    with torch.no_grad():
        read = load(session.run, tmp_path / "result")(input_ids=tokens).logits
    read = read[:, -tokens.shape[1] :]  # PEFT gives a soft prompt's own, too, before them
    assert _off(read, expected) < ROUNDING
    start, _ = session_of(method)
    assert _off(_logits(start, tokens), expected) > 100 * ROUNDING, "two steps that are told apart"


@pytest.mark.parametrize("method", METHODS)
def test_merged_it_computes_what_was_trained_or_is_refused(method: str, tmp_path: Path) -> None:
    session, data = session_of(method, "optim.lr=1e-2")
    if session.run.method.whole:
        return  # nothing is to merge
    _train(session, data, 1, 2)
    write_result(session, tmp_path / "result")
    tokens = torch.arange(40)[None] + 60
    model, refusal = None, ""
    try:
        model = merged(session.run, tmp_path / "result")
    except ValueError as error:
        refusal = str(error)
    if model is None:
        assert "merge" in refusal
        assert "--to adapter" in refusal
        return
    assert not [name for name, _ in model.named_parameters() if "lora" in name or "adapter" in name]
    with torch.no_grad():
        assert _off(model(input_ids=tokens).logits, _logits(session, tokens)) < ROUNDING


def _train(session: Session, data: Dataset, *steps: int) -> None:
    for step in steps:
        assert train_step(session, step_batches(session, data, step)[1], step, 1.0).moved


def _logits(session: Session, tokens: Tensor) -> Tensor:
    """(1, T, V) of one example."""
    session.model.eval()
    session.run.strategy.rest()
    length = tokens.shape[1]
    with torch.no_grad():
        logits: Tensor = session.module(
            input_ids=tokens, position_ids=torch.arange(length)[None], segment_lengths=(length,), use_cache=False
        ).logits
    return logits


def _off(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())
