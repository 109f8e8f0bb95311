"""The loop's side of checkpoints: when one is due, and what becomes of it."""

import math
from collections.abc import Mapping
from typing import Any

from dsft.checkpoint.manifest import folder_name
from dsft.checkpoint.saver import Outcome, Saver
from dsft.config import Run, Train
from dsft.engine.evaluate import Answer, Evaluation
from dsft.engine.progress import Progress, Watch

SHOWN = 5
"""Answers of an evaluation that a checkpoint remembers: as many as the end of a run shows."""


class Keeper:
    """Saves at step 1 (so that a disk that cannot be written costs seconds), every so many steps, and at the end."""

    def __init__(self, saver: Saver, run: Run, *, saved: int) -> None:
        self.saver, self.run, self.config = saver, run, run.checkpoint
        self.started = self.saved = self.asked = saved
        self.probing = saved == 0

    @property
    def busy(self) -> bool:
        """A save is in flight on this rank."""
        return self.saver.busy

    def settle(self) -> None:
        """Before parameters move: wait until a save in flight has copied them."""
        self.saver.settle()

    def tend(self, at: Progress, watch: Watch, *, busy: bool, last: bool) -> None:
        """After each step, on all ranks: tell what became of a save, begin the one that is due. busy: on any rank.

        One that falls due while another is in flight is made as soon as that one is over. last: the loop ends here, and
        what is returned from has been saved, or was said not to be.
        """
        if self.config.every == 0:
            return
        if last or not busy:
            self._report(self.saver.take(), watch)
        if at.step > self.saved and (last or (not busy and self._due(at.step))):
            background = self.config.background and not last
            self.asked = at.step
            progress = remember(at, self.run.optim.name)
            self.saver.start(at.step, self.run.strategy.export_state, progress, background=background)
            if not background:
                self._report(self.saver.take(), watch)

    def _due(self, step: int) -> bool:
        """The first step of all, or a multiple of every since the last save was begun."""
        return self.asked == 0 or step // self.config.every > self.asked // self.config.every

    def _report(self, outcome: Outcome | None, watch: Watch) -> None:
        if outcome is None:
            return
        if outcome.error is None:
            if self.saved == self.started > 0 and self.saver.lease is not None:
                self.saver.store.forget_crashes(self.started)
            self.saved, self.probing = outcome.step, False
            details = {"checkpoint": folder_name(outcome.step), "bytes": outcome.nbytes, "seconds": outcome.seconds}
            watch.event("save", outcome.step, {**details, "stall_s": outcome.stall_s, "deleted": outcome.deleted})
            return
        watch.event("save_failed", outcome.step, {"error": outcome.error, "newest": self.saved})
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
        over=train.early_stop_metric is not None and state["worse"] >= train.early_stop_patience,
        evaluations=[
            (past["step"], Evaluation(past["values"], [Answer(**answer) for answer in past["answers"]]))
            for past in state["evaluations"]
        ],
    )
