"""objective.reference: the base, or another run's result, in place of the policy as it was at the start."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.matrix_rows import chosen
from dsft.engine.assemble import Session
from dsft.engine.evaluate import evaluate
from dsft.engine.loop import step_batches
from dsft.engine.scored_once import score_once
from dsft.engine.step import train_step
from tests.contract.sessions import covering, left_by, session_of

ADAPTERS = covering(["lora", "pfeiffer", "ia3", "qlora", "bitfit", "dora"])


def _dpo(place: Path, *words: str) -> list[str]:
    return ["objective=dpo", *chosen("pair", place), *words]


def _scores(session: Session, batches: list[object], role: str) -> list[torch.Tensor]:
    return session.roles.score(role, batches)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_base_is_the_model_without_the_adapter(method: str, place: Path, tmp_path: Path) -> None:
    left_by(tmp_path, method)
    session, data = session_of(method, *_dpo(place, f"method.init_from={tmp_path}", "objective.reference=base"))
    plain, _ = session_of(method, *_dpo(place))
    start, _ = session_of(method, *_dpo(place, f"method.init_from={tmp_path}"))
    batches = step_batches(session, data, 1)[1]
    policy, other = _scores(session, batches, "policy"), _scores(session, batches, "start")
    assert all(map(torch.equal, other, _scores(plain, batches, "policy")))
    assert all(map(torch.equal, policy, _scores(start, batches, "policy")))
    assert not torch.allclose(policy[0], other[0])
    assert abs(train_step(session, batches, 1, 1.0).loss - math.log(2)) > 1e-4


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_is_the_model_that_it_has_left(method: str, place: Path, tmp_path: Path) -> None:
    left, _ = left_by(tmp_path, method)
    session, data = session_of(method, *_dpo(place, f"objective.reference={tmp_path}"))
    batches = step_batches(session, data, 1)[1]
    other, theirs = _scores(session, batches, "start"), _scores(left, batches, "policy")
    assert all(torch.allclose(mine, its, atol=1e-6) for mine, its in zip(other, theirs, strict=True))
    plain, _ = session_of(method, *_dpo(place))
    assert all(map(torch.equal, _scores(session, batches, "policy"), _scores(plain, batches, "policy")))
    for step in (1, 2):
        assert train_step(session, batches, step, 1.0).moved
    assert all(map(torch.equal, other, _scores(session, batches, "start")))


REFUSED = [
    (
        "prompt",
        "objective.reference=base",
        r"objective\.reference must be start for a method whose first values change",
    ),
    ("lora", "objective.reference={run}/nothing", r"objective\.reference must be a folder with adapter_config\.json"),
    ("lora", "objective.reference={full}", r"objective\.reference must hold an adapter, got a whole model"),
    ("full", "objective.reference={run}", r"objective\.reference must be start, base, or the folder of a run whose"),
    ("dora", "objective.reference={run}", r"objective\.reference must agree in use_dora"),
    ("lora", "objective.reference={run} method.rank=4", r"objective\.reference must agree in r, 4, got 16"),
]


@pytest.mark.parametrize(("method", "words", "message"), REFUSED)
def test_a_reference_that_cannot_be_had_is_refused(
    method: str, words: str, message: str, place: Path, tmp_path: Path
) -> None:
    for name, kind in (("run", "lora"), ("full", "full")):
        if f"{{{name}}}" in words:
            left_by(tmp_path / name, kind)
    given = words.format(run=tmp_path / "run", full=tmp_path / "full").split()
    with pytest.raises(ValueError, match=message) as caught:
        session_of(method, *_dpo(place, *given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_scores_that_were_computed_once_are_those_of_each_step(
    objective: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path))
    rows = chosen({"dpo": "pair", "kto": "rated"}[objective], place)
    words = [f"objective={objective}", *rows, "data.eval_fraction=0.3", "optim.lr=1e-2", "train.micro_batch_tokens=600"]
    plain, data = session_of("lora", *words)
    cached, other = session_of("lora", *words, "objective.reference_cache=true")
    with_scores = score_once(cached, other)
    assert cached.roles.values == {}, "the reference's values are not kept"
    for step in (1, 2, 3):
        mine = train_step(cached, step_batches(cached, with_scores, step)[1], step, 1.0)
        theirs = train_step(plain, step_batches(plain, data, step)[1], step, 1.0)
        assert mine.named == pytest.approx(theirs.named, rel=1e-5, abs=1e-5)
    assert evaluate(cached, with_scores).values == pytest.approx(evaluate(plain, data).values, rel=1e-5, abs=1e-5)
    (folder,) = (tmp_path / "references").iterdir()
    stamp = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again, _ = session_of("lora", *words, "objective.reference_cache=true")
    score_once(again, other)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamp, "read, not computed"
    np.save(folder / "train-scores.npy", 1 + np.load(folder / "train-scores.npy"))
    damaged, _ = session_of("lora", *words, "objective.reference_cache=true")
    assert np.array_equal(score_once(damaged, other).train.arrays["scores"], with_scores.train.arrays["scores"])
    session, _ = session_of("lora", *words, "objective.reference_cache=true", "method.alpha=8")
    score_once(session, other)
    assert len(list((tmp_path / "references").iterdir())) == 2, "another adapter has another key"
