"""The loop: steps that are not finite, early stopping, requests to stop, evaluation, all on a real tiny model."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dsft_launchers.verdict import DivergedError

from benchmarks.matrix_rows import chosen, write_rows
from dsft.checkpoint.manifest import Identity
from dsft.comm.world import World
from dsft.compose import compose
from dsft.data.open import Dataset, open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.evaluate import Evaluation
from dsft.engine.keep import Keeper, recall, remember
from dsft.engine.loop import fit
from dsft.engine.progress import Progress
from dsft.engine.resume import keeper_for
from dsft.engine.stop import StopFlag


class Seen:
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.events: list[str] = []

    def begin_step(self) -> None: ...

    def step(self, step: int, values: Mapping[str, float], ids: list[str]) -> None:
        assert len(ids) == 4
        self.steps.append(values)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.evaluations.append((step, evaluation))

    def event(self, event: str, step: int, details: Mapping[str, object]) -> None:
        self.events.append(event)


def _session(*words: str) -> tuple[Session, Dataset]:
    composed = compose([
        "model=tiny", "data=reasoning_gym", "data.size=32", "data.eval_size=5", "train.precision=fp32",
        "train.global_batch_size=4", "train.steps=6", "launcher=local", "method=lora", "optim.lr=1e-3",
        "checkpoint=none", *words,
    ])  # fmt: skip
    files = composed.run.model.resolve()
    data = open_data(composed.run.data, files.tokenizer(), max_length=512, seed=0)
    return assemble(composed.run, files, World(0, 1, 0, torch.device("cpu"))), data


def _fit(session: Session, data: Dataset, total: int, seen: Seen, stop: StopFlag) -> Progress:
    keeper = keeper_for(session, Path("absent"), Identity("run", "config", "base", "data"), None, saved=0)
    return fit(session, data, seen, stop, keeper, Progress(total=total))


def _poison(session: Session, at: int) -> dict[str, Any]:
    """Make the gradients of one step NaN, as an overflow would."""
    calls = {"count": 0}
    whole = session.run.strategy.backward

    def backward(loss: torch.Tensor, *, last: bool) -> None:
        calls["count"] += last
        whole(loss * math.nan if calls["count"] == at else loss, last=last)

    object.__setattr__(session.run.strategy, "backward", backward)
    return calls


def test_evaluates_before_and_after_and_loss_falls() -> None:
    session, data = _session()
    seen = Seen()
    at = _fit(session, data, 6, seen, StopFlag())
    assert (at.state, at.step) == ("done", 6)
    assert [step for step, _ in seen.evaluations] == [0, 6]
    first, last = (evaluation.values for _, evaluation in seen.evaluations)
    assert last["eval/loss"] < first["eval/loss"]
    assert 0 <= last["eval/accuracy"] <= 1
    assert len(seen.evaluations[0][1].answers) == 5


def test_a_step_that_is_not_finite_moves_nothing_and_is_skipped() -> None:
    session, data = _session("train.on_nonfinite=skip")
    _poison(session, at=2)
    seen = Seen()
    at = _fit(session, data, 4, seen, StopFlag())
    assert (at.step, at.skipped, seen.events) == (4, 1, ["nonfinite"])
    assert math.isnan(seen.steps[1]["grad_norm"])
    assert all(math.isfinite(values["grad_norm"]) for values in (seen.steps[0], *seen.steps[2:]))
    assert all(torch.isfinite(param).all() for param in session.model.parameters() if param.is_floating_point())


def test_a_step_that_is_not_finite_ends_the_run_by_default() -> None:
    session, data = _session()
    _poison(session, at=2)
    with pytest.raises(DivergedError, match=r"step 2: .*nothing was updated"):
        _fit(session, data, 4, Seen(), StopFlag())


def test_what_moves_in_backward_has_moved_by_a_nan_and_the_run_says_so() -> None:
    session, data = _session("optim.in_backward=true", "train.max_grad_norm=inf")
    _poison(session, at=2)
    with pytest.raises(DivergedError, match=r"step 2: .*gradient norm nan; parameters have moved by it"):
        _fit(session, data, 4, Seen(), StopFlag())


def test_the_budget_of_skipped_steps_ends_the_run() -> None:
    session, data = _session("train.on_nonfinite=skip", "train.max_nonfinite=0")
    _poison(session, at=1)
    with pytest.raises(DivergedError, match=r"train\.max_nonfinite=0"):
        _fit(session, data, 4, Seen(), StopFlag())


def test_an_evaluation_that_is_not_finite_ends_the_run_with_the_step() -> None:
    session, data = _session("method=lora", "optim.lr=1e30", "optim.schedule=constant")
    seen = Seen()
    with pytest.raises(DivergedError, match=r"eval/loss after step 1 is (nan|inf); lower optim\.lr"):
        _fit(session, data, 1, seen, StopFlag())
    assert [at for at, _ in seen.evaluations] == [0, 1]


def test_stops_early_when_the_metric_gets_no_better() -> None:
    session, data = _session(
        "train.eval_every=1", "train.early_stop_metric=eval/accuracy", "train.early_stop_patience=2"
    )
    seen = Seen()
    at = _fit(session, data, 6, seen, StopFlag())
    assert at.step == 3  # the first evaluation sets the mark, the next two are no better than 0 %
    assert "early_stop" in seen.events


def test_a_signal_stops_the_run_at_the_next_step() -> None:
    session, data = _session()
    stop = StopFlag()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        stop.bind()
        os.kill(os.getpid(), signal.SIGUSR2)
        at = _fit(session, data, 6, Seen(), stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (at.state, at.step, at.reason) == ("stopped", 0, "SIGUSR2")


LATE = """
import os
from dsft.engine.stop import SIGNALS, StopFlag

class Late:
    def __del__(self):
        for number in SIGNALS:
            os.kill(os.getpid(), number)

stop = StopFlag()
stop.bind()
stop.ignore()
kept = Late()  # a global goes when the interpreter has given its handlers back
"""


def test_signals_to_a_process_that_has_saved_and_ends_change_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], check=False)
    assert done.returncode == 0


def test_the_clock_stops_the_run_like_a_signal() -> None:
    session, data = _session()
    at = _fit(session, data, 6, Seen(), StopFlag(max_minutes=1e-6))
    assert (at.state, at.step) == ("stopped", 0)
    assert at.reason.startswith("train.max_minutes=1e-06 are over before this start made its first step")
    assert StopFlag(max_minutes=60).reason is None


class Asked(StopFlag):
    """Asked to stop from the n-th look on."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def reason(self) -> str | None:
        self.looks -= 1
        return "SIGTERM" if self.looks < 0 else None


def test_a_stop_is_looked_at_between_the_batches_of_an_evaluation_which_is_owed_then() -> None:
    session, data = _session("train.micro_batch_tokens=16")  # an example a batch
    seen = Seen()
    at = _fit(session, data, 6, seen, Asked(3))
    assert (at.state, at.step, at.owed, seen.evaluations, seen.steps) == ("stopped", 0, True, [], [])
    assert seen.events == ["stopping"]
    again = recall(0, 6, remember(at, "adamw"), session.run.train)
    assert again.owed


def test_an_evaluation_that_is_owed_is_made_first_and_once() -> None:
    session, data = _session()
    seen = Seen()
    keeper = keeper_for(session, Path("absent"), Identity("run", "config", "base", "data"), None, saved=0)
    fit(session, data, seen, StopFlag(), keeper, Progress(total=6, step=6, owed=True))
    assert ([step for step, _ in seen.evaluations], seen.steps) == ([6], [])
    fit(session, data, seen, StopFlag(), keeper, Progress(total=6, step=6))
    assert len(seen.evaluations) == 1


def test_random_streams_depend_on_seed_and_step_alone() -> None:
    losses = []
    for _ in range(2):
        session, data = _session("method.dropout=0.3")
        torch.manual_seed(torch.randint(0, 1000, ()).item())  # whatever the process drew before
        seen = Seen()
        _fit(session, data, 3, seen, StopFlag())
        losses.append([values["loss"] for values in seen.steps])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("objective", "kind", "calls"), [("sft", "text", 1), ("dpo", "pair", 2)])
def test_a_save_has_copied_before_each_change_of_values(
    objective: str, kind: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a step before parameters move, and once before a reference is shown in their place."""
    write_rows(tmp_path / "rows.jsonl", 2)
    seen = []
    monkeypatch.setattr(Keeper, "settle", lambda keeper: seen.append(keeper))
    run = compose([
        "model=tiny", f"objective={objective}", *chosen(kind, tmp_path), "train.precision=fp32", "train.steps=3",
        "train.global_batch_size=4", "launcher=local", "method=lora", "checkpoint=none", "optim.lr=1e-3",
    ]).run  # fmt: skip
    files = run.files()
    data = open_data(run.data, files.tokenizer(), max_length=512, seed=0, wants=run.objective.wants)
    _fit(assemble(run, files, World(0, 1, 0, torch.device("cpu"))), data, 3, Seen(), StopFlag())
    assert len(seen) == 3 * calls
