"""Preference losses are TRL's, step by step, from the same adapter: goldens of benchmarks/trl_goldens.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.preference_case import (
    ALPHA,
    BATCH,
    BETA,
    CENTER,
    GAMMA,
    GOLDENS,
    LENGTH,
    MODELS,
    RANK,
    RATE,
    STEPS,
    TARGETS,
    prepare,
)  # fmt: skip
from dsft.comm.world import World
from dsft.compose import compose
from dsft.data.open import open_for
from dsft.engine.assemble import assemble
from dsft.engine.loop import step_batches
from dsft.engine.step import StepResult, train_step

ALONE = World(0, 1, 0, torch.device("cpu"))
BOUND = 1e-4
WORDS = {
    "dpo": ["objective=dpo"],
    "hinge": ["objective=dpo", "objective.loss=hinge"],
    "ipo": ["objective=dpo", "objective.loss=ipo"],
    "orpo": ["objective=orpo"],
    "simpo": ["objective=simpo", f"objective.gamma={GAMMA}"],
    "kto": ["objective=kto", "objective.desirable_weight=1.3", "objective.undesirable_weight=0.8"],
    "reward": ["objective=reward", f"objective.center={CENTER}"],
}
EQUAL = ("dpo", "hinge", "simpo", "kto", "reward")
"""The others are TRL's own in one point each: see docs/objectives.md."""


@pytest.fixture(
    scope="module", params=[MODELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS[1:])]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    base = compose([f"model={request.param}"]).run.model.resolve().folder
    return request.param, prepare(tmp_path_factory.mktemp("case") / "case", base)


def _steps(objective: str, places: dict[str, Path], steps: int = STEPS) -> list[StepResult]:
    rows = places["rated.jsonl" if objective == "kto" else "pairs.jsonl"]
    run = compose([
        "model=custom", f"model.path={places['model']}", "method=lora", f"method.rank={RANK}", f"method.alpha={ALPHA}",
        f"method.target_modules=[{','.join(TARGETS)}]", f"method.init_from={places['adapter']}", "data=local",
        f"data.path={rows}", "data.shuffle=false", "train.precision=fp32", f"train.steps={STEPS}", "launcher=local",
        f"train.global_batch_size={BATCH}", f"train.max_length={LENGTH}", "train.max_grad_norm=1.0", "strategy=single",
        f"optim.lr={RATE}", "optim.schedule=constant", "optim.weight_decay=0", "optim.betas=[0.9,0.999]",
        "optim.eps=1e-8", "tracker=[]", *WORDS[objective],
        *([] if objective == "reward" else [f"objective.beta={BETA}"]),
    ]).run  # fmt: skip
    files = run.files()
    data = open_for(run, files.tokenizer())
    session = assemble(run, files, ALONE)
    return [train_step(session, step_batches(session, data, step)[1], step, 1.0) for step in range(1, steps + 1)]


def _goldens(model: str, objective: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(GOLDENS.read_text())[model]["steps"][objective]
    return found


@pytest.mark.parametrize("objective", EQUAL)
def test_losses_and_gradient_norms_are_those_of_trl(objective: str, case: tuple[str, dict[str, Path]]) -> None:
    model, places = case
    theirs = _goldens(model, objective)
    for mine, golden in zip(_steps(objective, places), theirs, strict=True):
        assert mine.loss == pytest.approx(golden["loss"], rel=BOUND)
        assert mine.grad_norm == pytest.approx(golden["grad_norm"], rel=10 * BOUND, abs=1e-6)
    assert abs(theirs[-1]["loss"] / theirs[0]["loss"] - 1) > 1e-3


def test_where_trl_divides_or_counts_otherwise_the_rest_is_equal(case: tuple[str, dict[str, Path]]) -> None:
    """The odds ratio of ORPO is TRL's, whose cross entropy counts the prompt's tokens too."""
    model, places = case
    (mine,) = _steps("orpo", places, 1)
    theirs = _goldens(model, "orpo")[0]
    assert mine.terms["odds"] == pytest.approx(-BETA * theirs["log_odds_ratio"], rel=BOUND)
    assert mine.loss != pytest.approx(theirs["loss"], rel=BOUND)
