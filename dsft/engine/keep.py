"""The loop's side of checkpoints: when one is due, and what becomes of it."""

import math
import time
from collections.abc import Mapping
from typing import Any

from dsft.checkpoint.manifest import folder_name
from dsft.checkpoint.saver import Outcome, Saver
from dsft.config import Run, Train
from dsft.engine.evaluate import Answer, Evaluation
from dsft.engine.progress import Progress, Watch

LATE_FACTOR, LATE_S = 3.0, 10.0
"""A save is late once it has taken so many times the longest so far and LATE_S besides, and the next one is due."""
LOOK_S = 1.0
"""How often the end of a run looks at a save that it waits for."""

SHOWN = 5
"""Answers of an evaluation that a checkpoint remembers: as many as the end of a run shows."""


class Keeper:
    """Saves at step 1 (so that a disk that cannot be written costs seconds), every so many steps, and at the end."""

    def __init__(self, saver: Saver, run: Run, *, saved: int) -> None:
        self.saver, self.run, self.config = saver, run, run.checkpoint
        self.started = self.saved = self.asked = saved
        self.probing = saved == 0
        self.told_late_s = 0.0

    @property
    def busy(self) -> bool:
        """A save is in flight on this rank."""
        return self.saver.busy

    def settle(self) -> None:
        """Before parameters move: wait until a save in flight has copied them."""
        self.saver.settle()

    def work_s(self, state_s: float) -> float:
        """Return the seconds that a save may take: by the longest so far, else those of its bytes, state_s."""
        return LATE_FACTOR * self.saver.longest_s if self.saver.longest_s else state_s

    def tend(self, at: Progress, watch: Watch, *, busy: bool, last: bool) -> None:
        """After each step, on all ranks: tell what became of a save, begin the one that is due. busy: on any rank.

        One that falls due while another is in flight is made as soon as that one is over. last: the loop ends here, and
        what is returned from has been saved, or was said not to be. The step with the best evaluation so far is saved
        too, after the one in flight.
        """
        if self.config.every == 0:
            return
        last_or_best = last or at.best_step == at.step > self.saved
        while last_or_best and not self.saver.ended(LOOK_S):
            self._tell_late(at.step, watch)
        if last_or_best or not busy:
            self._report(self.saver.take(), watch, at, last=last and self.asked == at.step)
            self.told_late_s = 0.0
        elif self._due(at.step):
            self._tell_late(at.step, watch)
        if at.step > self.saved and (last_or_best or (not busy and self._due(at.step))):
            background = self.config.background and not last
            self.asked = at.step
            progress = remember(at, self.run.optim.name)
            exempt = frozenset(step for step, _ in at.bests[-1:])
            self.saver.start(at.step, self.run.strategy.export_state, progress, background=background, exempt=exempt)
            if not background:
                self._report(self.saver.take(), watch, at, last=last)

    def _due(self, step: int) -> bool:
        """Return True for the first step of all, and once a multiple of every or keep_every was passed unsaved."""
        periods = [period for period in (self.config.every, self.config.keep_every) if period]
        return self.asked == 0 or any(step // period > self.asked // period for period in periods)

    def _tell_late(self, step: int, watch: Watch) -> None:
        """Tell of a save that is still in flight when the next one is due; again each time its seconds have doubled."""
        if self.saver.in_flight_since is None:
            return
        of, begun = self.saver.in_flight_since
        seconds = time.monotonic() - begun
        if seconds > max(LATE_FACTOR * self.saver.longest_s + LATE_S, 2 * self.told_late_s):
            self.told_late_s = seconds
            details = {"of": of, "seconds": seconds, "newest": self.saved, "longest": self.saver.longest_s}
            watch.event("save_late", step, details)

    def _report(self, outcome: Outcome | None, watch: Watch, at: Progress, *, last: bool) -> None:
        if outcome is None:
            return
        if outcome.settled is not None:
            watch.event(outcome.settled.event, outcome.settled.step, outcome.settled.details)
        if outcome.error is None:
            if self.saved == self.started > 0 and self.saver.lease is not None:
                self.saver.store.forget_crashes(self.started)
            self.saved, self.probing = outcome.step, False
            details = {"checkpoint": folder_name(outcome.step), "bytes": outcome.nbytes, "seconds": outcome.seconds}
            watch.event("save", outcome.step, {**details, "stall_s": outcome.stall_s, "deleted": outcome.deleted})
            return
        if at.best_step == outcome.step:  # nothing is there to go back to; the one before it still is
            at.bests.pop()
        then = "the run ends here" if last else "training goes on"
        watch.event("save_failed", outcome.step, {"error": outcome.error, "newest": self.saved, "then": then})
        if self.probing:
            raise RuntimeError(
                f"the first save failed ({outcome.error}), so nothing of this run could be kept; make run_dir writable "
                "with space for it, or go without checkpoints by checkpoint=none"
            )


def remember(at: Progress, optimizer: str) -> dict[str, Any]:
    """The loop's own state as JSON."""
    return {
        "optimizer": optimizer,
        "skipped": at.skipped,
        "best": at.best if math.isfinite(at.best) else None,
        "worse": at.worse,
        "owed": at.owed,
        **({"bests": at.bests} if at.bests else {}),
        "evaluations": [
            {"step": step, "values": result.values, "answers": [vars(answer) for answer in result.answers[:SHOWN]]}
            for step, result in at.evaluations
        ],
    }


def recall(step: int, total: int, state: Mapping[str, Any], train: Train) -> Progress:
    """The Progress that was remembered at step; total and train's patience may be others now."""
    return Progress(
        step=step,
        total=total,
        skipped=state["skipped"],
        best=math.inf if state["best"] is None else state["best"],
        worse=state["worse"],
        owed=state.get("owed", False),  # a checkpoint of an earlier version owes none
        bests=[(step, value) for step, value in state.get("bests", ())],
        over=train.early_stop_metric is not None and state["worse"] >= train.early_stop_patience,
        evaluations=[
            (past["step"], Evaluation(past["values"], [Answer(**answer) for answer in past["answers"]]))
            for past in state["evaluations"]
        ],
    )
