"""What every objective under conf/objective must keep, found by glob; and where those with a reference begin."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dsft_launchers.verdict import RefusedError
from torch import Tensor

from benchmarks.matrix_rows import chosen
from dsft.compose import compose
from dsft.data.batch import build_batch
from dsft.data.open import Dataset
from dsft.engine import step as steps
from dsft.engine.assemble import Session, skeleton
from dsft.engine.evaluate import evaluate
from dsft.engine.forward import forward
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step
from dsft.models.scorer import Scorer
from dsft.objective import Batch
from tests.contract.sessions import FOLDERS, METHODS, composed_of, covering, left_by, session_of

OBJECTIVES = sorted({path.stem for folder in FOLDERS for path in (folder / "objective").glob("*.yaml")})
STARTS = {"sigmoid": math.log(2), "ipo": 25.0, "hinge": 1.0}
"""objective.loss of dpo -> its loss where policy and reference are the same, at beta = 0.1."""
NOISY = ("diff_pruning",)
ROUNDED = ("p_tuning",)
"""Its LSTM has another kernel in a pass without a gradient."""


def _words(objective: str, place: Path) -> list[str]:
    wants = compose([f"objective={objective}"]).run.objective.wants
    return [f"objective={objective}", *chosen(wants, place), "data.eval_fraction=0.3"]


def _second(session: Session, data: Dataset, *, silent: bool = False, patch: Any = None) -> dict[str, float]:
    """What the second step of two gives. patch: plants a mean over micro-batches of each one's own mean."""
    for step in (1, 2):
        batches = step_batches(session, data, step)[1]
        if silent:
            beside = batches[0].beside
            beside = beside if beside is None else replace(beside, counts=False)
            batches.insert(1, replace(batches[0], counts=False, beside=beside))
        if patch:
            units = [session.run.objective.count(batch) for batch in batches]
            patch.setattr(steps, "forward", partial(_mean_of_means, torch.stack(units).sum(0) / len(units)))
        result = train_step(session, batches, step, 1.0)
    return {**result.named, "grad_norm": result.grad_norm}


def _mean_of_means(units: Tensor, session: Session, step: int, index: int, batch: Batch) -> tuple[Tensor, Any]:
    terms, metrics = forward(session, step, index, batch)
    return terms * units / session.run.objective.count(batch).clamp(min=1), metrics


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_and_silence_change_nothing(objective: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, packed, and in groups of several sizes with a silent one: equal losses, measures and norms."""
    words = [*_words(objective, place), "train.global_batch_size=5"]
    session, data = session_of("lora", *words, "train.micro_batch_tokens=1")
    groups = 2 * max(session.lengths(data.train, range(len(data.train))))
    found = _second(session, data)
    for budget, silent in ((4000, False), (groups, True)):
        other = _second(*session_of("lora", *words, f"train.micro_batch_tokens={budget}"), silent=silent)
        assert other == pytest.approx(found, rel=1e-5, abs=1e-7)
    planted = _second(*session_of("lora", *words, f"train.micro_batch_tokens={groups}"), patch=monkeypatch)
    assert planted["loss"] != pytest.approx(found["loss"], rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_evaluation_divides_as_a_step_does(objective: str, place: Path) -> None:
    """Each name that a step logs is evaluated, and is the same of the same rows."""
    session, data = session_of("lora", *_words(objective, place), "train.micro_batch_tokens=1")
    assert data.eval is not None
    mismatched = session.run.objective.mismatched
    batches = [build_batch(data.eval, [row], mismatched=mismatched) for row in range(len(data.eval))]
    before = evaluate(session, data).values
    found = train_step(session, batches, 1, 1.0).named
    assert before == pytest.approx({f"eval/{name}": value for name, value in found.items()}, rel=1e-6, abs=1e-9)
    assert {"loss"} | session.run.objective.measures.keys() == found.keys() - {
        f"loss/{x}" for x in session.run.objective.terms
    }


def test_scores_and_entropies_are_the_same_one_by_one(place: Path) -> None:
    session, data = session_of("lora", *_words("dpo", place))
    batch = step_batches(session, data, 1)[1][0]
    packed, alone = session.scorer, Scorer(session.module, packs=False)
    found = packed.score_with_entropy(batch, temperature=0.7)
    torch.testing.assert_close(alone.score_with_entropy(batch, temperature=0.7), found)
    torch.testing.assert_close(packed.score(batch, temperature=0.7), found[0])
    assert not torch.allclose(packed.score(batch), found[0])
    assert bool((found[1] > 0).all())


@pytest.mark.parametrize("method", covering(name for name in METHODS if name not in NOISY))
def test_a_reference_is_the_policy_at_the_start(method: str, place: Path) -> None:
    """The first loss is ln 2 to the last bit, the second is not; and the reference has stayed where it was."""
    session, data = session_of(method, *_words("dpo", place), "optim.lr=1e-2")
    batches = step_batches(session, data, 1)[1]
    before = [score.clone() for score in session.roles.score("start", batches)]
    first, second = (train_step(session, batches, step, 1.0) for step in (1, 2))
    exact = 0 if method not in ROUNDED else 1e-6
    assert first.loss == pytest.approx(math.log(2), abs=exact + 1e-15)
    assert first.measures["reference_gap"] <= exact
    assert second.measures["reference_gap"] > 0
    assert all(map(torch.equal, before, session.roles.score("start", batches)))


@pytest.mark.parametrize("words", [("train.precision=bf16",), ("objective.loss=ipo",), ("objective.loss=hinge",)])
def test_first_losses_in_bf16_and_of_other_kinds(words: tuple[str, ...], place: Path) -> None:
    session, data = session_of("full", *_words("dpo", place), *words)
    found = train_step(session, step_batches(session, data, 1)[1], 1, 1.0)
    assert found.loss == pytest.approx(STARTS[getattr(session.run.objective, "loss", "sigmoid")], abs=1e-12)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_reference_of_a_run_that_starts_from_another(method: str, place: Path, tmp_path: Path) -> None:
    """The reference is what the run starts from, and not the base."""
    left_by(tmp_path, method)
    start = [f"method.init_from={tmp_path}"] if method != "full" else ["model=custom", f"model.path={tmp_path}/adapter"]
    session, data = session_of(method, *_words("dpo", place), *start)
    plain, _ = session_of(method, *_words("dpo", place))
    batches = step_batches(session, data, 1)[1]
    mine, base = (each.roles.score("start", batches)[0] for each in (session, plain))
    assert not torch.allclose(mine, base)
    assert train_step(session, batches, 1, 1.0).loss == pytest.approx(math.log(2), abs=1e-15)


def test_a_save_has_copied_the_policy_before_the_reference_is_shown(place: Path) -> None:
    """A save in the background copies while the next step computes: what it copies must be the policy's values."""
    session, data = session_of("lora", *_words("dpo", place), "optim.lr=1e-2")
    for step in (1, 2):
        batches = step_batches(session, data, step)[1]
        policy, seen = session.run.strategy.snapshot(), []
        session.roles.settle = lambda kept=seen: kept.append(session.run.strategy.snapshot())  # type: ignore[misc]
        train_step(session, batches, step, 1.0)
        assert all(map(torch.equal, seen[0], policy))
    assert not all(map(torch.equal, policy, session.roles.values["start"]))


@pytest.mark.parametrize("fault", ["moved", "dropping"])
def test_a_reference_that_is_not_the_start_ends_the_run(fault: str, place: Path) -> None:
    session, data = session_of("lora", *_words("dpo", place))
    if fault == "moved":
        session.roles.values["start"][1].add_(0.01)
    else:  # the adapter drops entries in the pass with a gradient, and not in the other
        head = session.model.get_submodule(session.anatomy.blocks[0])
        head.register_forward_hook(lambda module, args, out: out * 1.01 if module.training else out)
    with pytest.raises(RefusedError, match="reference_gap must be 0 before the first update"):
        train_step(session, step_batches(session, data, 1)[1], 1, 1.0)


def test_dropout_of_method_and_model_is_set_to_0_and_said(place: Path) -> None:
    composed = composed_of("lora", *_words("dpo", place), "method.dropout=0.1")
    assert composed.run.method.dropout == 0
    assert any("method.dropout=0" in line and "0.1" in line for line in composed.repairs)
    run = compose(["objective=dpo", "model=tiny", "model.init=random"]).run
    bones = skeleton(run, run.model.resolve())
    assert bones.silenced == ()


def test_random_gates_beside_a_reference_are_refused() -> None:
    with pytest.raises(ValueError, match="method=diff_pruning draws random gates"):
        compose(["objective=dpo", "method=diff_pruning"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective=sft", "train.early_stop_metric=eval/reward_accuracy"], "one of eval/loss eval/accuracy"),
        (["objective=dpo", "train.early_stop_metric=eval/accuracy"], "eval/reward_accuracy eval/reward_margin"),
        (["objective=orpo", "train.early_stop_metric=loss"], "eval/loss eval/loss/nll eval/loss/odds"),
    ],
)
def test_a_metric_that_nobody_measures_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compose([*words, "train.eval_every=1"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_its_yaml_says_when_to_choose_it(objective: str) -> None:
    text = next(
        path for folder in FOLDERS if (path := folder / "objective" / f"{objective}.yaml").is_file()
    ).read_text()
    keys: dict[str, Any] = yaml.safe_load(text)
    assert text.startswith("# ")
    assert "Choose it" in text
    assert all(f"\n{key}:" in f"\n{text}" for key in keys)
    assert json.dumps(keys)
