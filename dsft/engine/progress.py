"""Where a run's loop is, and whom it tells."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from dsft.engine.evaluate import Evaluation

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
    """Where the loop is. total: steps in all; over: it ended before them (early stop).

    owed: the evaluation after this step is still to be made; a request to stop may come before or during it. state and
    reason: how the loop ended. bests: steps whose evaluation improved checkpoint.keep_best, and its value, lower is
    better.
    """

    total: int
    step: int = 0
    skipped: int = 0
    best: float = math.inf
    worse: int = 0
    over: bool = False
    owed: bool = False
    state: str = DONE
    reason: str = ""
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)
    bests: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best_step(self) -> int | None:
        """The step with the best evaluation by checkpoint.keep_best, whose state is saved or about to be."""
        return self.bests[-1][0] if self.bests else None
