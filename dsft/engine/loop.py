"""The training loop: evaluate, step, record, decide together, evaluate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dsft.data.batch import build_batch
from dsft.data.open import Dataset
from dsft.data.order import batch_rows
from dsft.data.packing import plan_step
from dsft.engine.assemble import Session
from dsft.engine.evaluate import Evaluation, evaluate
from dsft.engine.optimizers import rate
from dsft.engine.step import StepResult, train_step
from dsft.engine.stop import StopFlag
from dsft.protocols import Batch

DONE, STOPPED = "done", "stopped"


class Watch(Protocol):
    """What the loop tells the outside, on every rank."""

    def begin_step(self) -> None:
        """A step begins."""

    def step(self, step: int, values: Mapping[str, float], ids: list[str]) -> None:
        """A step is over; ids of its examples in global order."""

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """An evaluation after step is over."""

    def event(self, event: str, step: int, details: Mapping[str, object]) -> None:
        """Something else happened."""


@dataclass
class Progress:
    """Where the loop is. state and reason: how it ended."""

    step: int = 0
    skipped: int = 0
    best: float = math.inf
    worse: int = 0
    state: str = DONE
    reason: str = ""
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)


def fit(session: Session, data: Dataset, total: int, watch: Watch, stop: StopFlag) -> Progress:
    """Train for total steps, or until a stop is agreed. Collective."""
    train = session.run.train
    at = Progress()
    _evaluate(session, data, at, watch)
    while at.step < total:
        if stop.agreed(session.world):
            at.state, at.reason = STOPPED, stop.reason or "another rank was asked to stop"
            return at
        at.step += 1
        watch.begin_step()
        rows, batches = step_batches(session, data, at.step)
        scale = rate(session.run.optim, at.step, total)
        result = train_step(session, batches, at.step, scale)
        watch.step(at.step, _values(session, result, scale), [data.train.id(row) for row in rows])
        if not result.moved:
            _survive(session, at, result, watch)
        if train.eval_every and at.step % train.eval_every == 0 and at.step < total:
            _evaluate(session, data, at, watch)
            if _no_better(session, at):
                watch.event("early_stop", at.step, {"metric": train.early_stop_metric, "best": abs(at.best)})
                break
    if at.evaluations and at.evaluations[-1][0] != at.step:
        _evaluate(session, data, at, watch)
    return at


def step_batches(session: Session, data: Dataset, step: int) -> tuple[list[int], list[Batch]]:
    """The rows of this step in global order, and this rank's micro-batches of them."""
    run, world = session.run, session.world
    train = run.train
    rows = batch_rows(
        step, seed=train.seed, num_rows=len(data.train), batch_size=train.global_batch_size, shuffle=run.data.shuffle
    )
    ranks = run.strategy.data_ranks(world)
    plan = plan_step([int(data.train.lengths[row]) for row in rows], ranks, train.micro_batch_tokens)
    mine = plan[world.rank % ranks]
    return rows, [build_batch(data.train, [rows[i] for i in micro.examples], silent=micro.silent) for micro in mine]


def _values(session: Session, result: StepResult, scale: float) -> dict[str, float]:
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": session.run.optim.lr * scale,
        "tokens": result.tokens,
        "supervised_tokens": result.supervised,
    }


def _survive(session: Session, at: Progress, result: StepResult, watch: Watch) -> None:
    """A NaN or Inf: nothing moved on any rank. Go on within the budget, or end the run."""
    train = session.run.train
    at.skipped += 1
    what = f"step {at.step}: loss {result.loss}, gradient norm {result.grad_norm}; nothing was updated"
    watch.event("nonfinite", at.step, {"loss": result.loss, "grad_norm": result.grad_norm, "skipped": at.skipped})
    if train.on_nonfinite == "stop":
        raise RuntimeError(f"{what}; train.on_nonfinite=skip goes on without such steps")
    if at.skipped > train.max_nonfinite:
        raise RuntimeError(f"{what}, and train.max_nonfinite={train.max_nonfinite} steps were skipped before")


def _evaluate(session: Session, data: Dataset, at: Progress, watch: Watch) -> None:
    if data.eval is None:
        return
    evaluation = evaluate(session, data)
    at.evaluations.append((at.step, evaluation))
    watch.evaluation(at.step, evaluation)


def _no_better(session: Session, at: Progress) -> bool:
    """True once the metric has not improved for early_stop_patience evaluations (accuracy up, all else down)."""
    name = session.run.train.early_stop_metric
    if name is None or not at.evaluations:
        return False
    values = at.evaluations[-1][1].values
    if name not in values:
        raise RuntimeError(f"train.early_stop_metric={name} was not measured; there are: {', '.join(values)}")
    value = -values[name] if "accuracy" in name else values[name]
    at.worse = 0 if value < at.best else at.worse + 1
    at.best = min(at.best, value)
    return at.worse >= session.run.train.early_stop_patience
