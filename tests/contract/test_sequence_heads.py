"""A head for sequences, under each method: it begins at 0, learns, is read back by others, and merges."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.matrix_rows import LABELS, chosen
from dsft.compared import _logits as logits_of
from dsft.compose import compose
from dsft.data.batch import build_batch
from dsft.engine.assemble import Session
from dsft.engine.loop import step_batches
from dsft.engine.result import write_result
from dsft.engine.step import train_step
from dsft.export import merged
from dsft.headed import labels_of
from dsft.loaded import load
from dsft.results import find
from tests.contract.sessions import METHODS, covering, left_by, session_of

ROUNDING = 1e-5
TOKENS = torch.arange(40)[None] + 60


def _words(objective: str, place: Path) -> list[str]:
    return [f"objective={objective}", *chosen({"reward": "pair"}.get(objective, "labelled"), place)]


def _live(session: Session, tokens: Tensor) -> Tensor:
    """(1, T, labels) of one example."""
    session.model.eval()
    session.run.strategy.rest()
    with torch.no_grad():
        found: Tensor = session.module(
            input_ids=tokens, position_ids=torch.arange(tokens.shape[1])[None], segment_lengths=(tokens.shape[1],),
            logits_to_keep=torch.arange(tokens.shape[1]), use_cache=False,
        ).logits  # fmt: skip
    return found


def _off(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("method", covering(METHODS))
def test_it_begins_at_0_learns_and_is_read_back(method: str, place: Path, tmp_path: Path) -> None:
    session, data = session_of(method, *_words("reward", place), "optim.lr=1e-2")
    for step in (1, 2):
        found = train_step(session, step_batches(session, data, step)[1], step, 1.0)
        assert found.moved
        assert step == 2 or found.loss == pytest.approx(math.log(2), abs=1e-15)
    write_result(session, tmp_path / "result")
    assert labels_of(tmp_path / "result") == ("reward",)
    expected = _live(session, TOKENS)
    assert expected.abs().max() > 1e-3
    probe = {"tokens": TOKENS, "kept": torch.arange(TOKENS.shape[1])}
    read = logits_of(load(session.run, tmp_path / "result"), probe, bf16=False)
    assert _off(read, expected) < ROUNDING
    if session.run.method.whole:
        return
    with contextlib.suppress(ValueError):  # where the maths forbids it, as the tests of results say
        assert _off(logits_of(merged(session.run, tmp_path / "result"), probe, bf16=False), expected) < ROUNDING


@pytest.mark.parametrize("method", ["lora", "full"])
def test_others_load_it_and_give_the_same_numbers(method: str, place: Path, tmp_path: Path) -> None:
    """Transformers' class and PEFT, called as their users call them, one row at a time."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    session, data = session_of(method, *_words("classification", place), "optim.lr=1e-2")
    batches = step_batches(session, data, 1)[1]
    train_step(session, batches, 1, 1.0)
    write_result(session, tmp_path)
    if method == "full":
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert model.config.id2label == dict(enumerate(LABELS))
    else:
        base = AutoModelForSequenceClassification.from_pretrained(session.files.folder, num_labels=3)
        model = PeftModel.from_pretrained(base, tmp_path)
        assert json.loads((tmp_path / "labels.json").read_text()) == list(LABELS)
    session.model.eval()
    batch = build_batch(data.train, [0, 1, 2, 3])
    with torch.no_grad():
        mine = session.scorer.outputs(batch)
        theirs = torch.cat([model(input_ids=row[None]).logits for row in batch.tokens.split(batch.lengths)])
    assert _off(mine, theirs) < ROUNDING


def test_a_run_on_a_folder_with_such_a_head_goes_on_from_it(place: Path, tmp_path: Path) -> None:
    session, _ = left_by(tmp_path, "full", *_words("reward", place))
    other = ["model=custom", f"model.path={tmp_path}/adapter"]
    again, _ = session_of("lora", *_words("reward", place), *other)
    assert torch.equal(_live(again, TOKENS), _live(session, TOKENS))
    anew, _ = session_of("lora", *_words("classification", place), *other)  # of another number of labels
    assert not _live(anew, TOKENS).any()


def test_what_cannot_answer_is_refused_where_answers_are_wanted(place: Path, tmp_path: Path) -> None:
    left_by(tmp_path, "lora", *_words("reward", place))
    with pytest.raises(ValueError, match=r"RUN must hold a result that answers, got .* whose head gives numbers"):
        find([tmp_path])
    with pytest.raises(ValueError, match=r"method\.init_from must hold an adapter of answers, got one with a head"):
        session_of("lora", "optim.lr=1e-3", f"method.init_from={tmp_path}")


def test_an_adapter_of_answers_is_where_a_reward_model_may_begin(place: Path, tmp_path: Path) -> None:
    first, _ = left_by(tmp_path, "lora")
    session, data = session_of("lora", *_words("reward", place), f"method.init_from={tmp_path}")
    mine, theirs = dict(session.model.named_parameters()), dict(first.model.named_parameters())
    learned = [name for name, param in theirs.items() if param.requires_grad]
    assert learned
    assert all(torch.equal(mine[name], theirs[name]) for name in learned)
    assert train_step(session, step_batches(session, data, 1)[1], 1, 1.0).loss == pytest.approx(math.log(2), abs=1e-15)


def test_an_objective_of_labels_needs_their_names(place: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.labels must list the labels .* got null; set data\.labels=\[a,b\]"):
        compose(["objective=classification", "data=local", f"data.path={place}/labelled.jsonl"])
    words = ["objective=classification", *chosen("labelled", place), "objective.class_weights=[1,2]"]
    with pytest.raises(ValueError, match=r"objective\.class_weights must have a number for each of the 3 labels"):
        compose(words)
