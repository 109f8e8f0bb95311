"""Evaluation inside of a run: made where it is due, limited in time, given up for a stop, and a reason to end early."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from dsft_launchers.verdict import WAY_OUT, DivergedError

from dsft.data.open import Dataset
from dsft.engine.assemble import Session
from dsft.engine.evaluate import ANSWERS_AT_ONCE, Asked, StoppedError, evaluate
from dsft.engine.patience import LATITUDE, Patience
from dsft.engine.progress import Progress, Watch


@dataclass
class Examiner:
    """Evaluates for the loop. asked: whether all ranks agree to stop; longest: seconds that each part took, at most."""

    session: Session
    data: Dataset
    watch: Watch
    asked: Asked
    patience: Patience
    longest: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def look(self, at: Progress) -> None:
        """Make the evaluation that at owes, unless a stop is agreed on first, and see whether it ends the run early.

        Collective.
        """
        every = self.session.run.train.eval_every
        due = at.step > 0 and every > 0 and at.step % every == 0
        if self.data.eval is not None:
            try:
                evaluation = evaluate(self.session, self.data, asked=self.asked, part=self._part)
            except StoppedError:
                return
            at.evaluations.append((at.step, evaluation))
            self.watch.evaluation(at.step, evaluation)
            loss = evaluation.values.get("eval/loss", 0.0)
            if not math.isfinite(loss):
                raise DivergedError(f"eval/loss after step {at.step} is {loss}; {WAY_OUT}")
            self._note_best(at, evaluation.values)
        at.owed = False
        if due and self._no_better(at):
            at.over = True
            if at.step < at.total:
                metric = self.session.run.train.early_stop_metric
                self.watch.event("early_stop", at.step, {"metric": metric, "best": abs(at.best)})

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Limit a part of an evaluation, and keep its time."""
        begun = time.monotonic()
        with self.patience.phase(name, self._usual(name)):
            yield
        self.longest[name] = max(time.monotonic() - begun, self.longest[name])

    def _usual(self, name: str) -> float:
        """Return the seconds that a part may take: by the longest so far, else by its tokens."""
        if name in self.longest:
            return LATITUDE * self.longest[name]
        held, limits = self.data.eval, self.patience.limits
        assert held is not None
        ranks = self.session.run.strategy.data_ranks(self.session.world)
        if name == "evaluation":
            tokens = int(held.lengths.sum()) // ranks + int(held.lengths.max())
            return limits.forward_s(tokens * self.session.run.objective.passes)
        prompts = -(-len(self.data.verifiable) // ranks)
        return limits.generation_s(prompts, int(held.supervised.max()) + 2, -(-prompts // ANSWERS_AT_ONCE))

    def _note_best(self, at: Progress, values: Mapping[str, float]) -> None:
        """Note a step of training whose evaluation is better than all before it."""
        name = self.session.run.checkpoint.keep_best
        if name is None or at.step == 0:
            return
        value = self._lower_is_better("checkpoint.keep_best", name, values)
        if not at.bests or value < at.bests[-1][1]:
            at.bests.append((at.step, value))
            start = dict(at.evaluations)[0].values.get(name) if at.evaluations[0][0] == 0 else None
            worse = start is not None and self._lower_is_better("", name, {name: start}) <= value
            beside = f", which is no better than {start:.4f} before the first step" if worse else ""
            self.watch.event("best", at.step, {"metric": name, "value": values[name], "beside": beside})

    def _lower_is_better(self, key: str, name: str, values: Mapping[str, float]) -> float:
        """The value of a metric, negative where higher is better. key: that asks for it."""
        if name not in values:
            raise RuntimeError(f"{key}={name} was not measured; there are: {', '.join(values)}")
        directions = {"accuracy": "max", **self.session.run.objective.measures}
        return -values[name] if directions.get(name.removeprefix("eval/")) == "max" else values[name]

    def _no_better(self, at: Progress) -> bool:
        """Return True once the metric has not improved for early_stop_patience evaluations."""
        train = self.session.run.train
        name = train.early_stop_metric
        if name is None or not at.evaluations:
            return False
        value = self._lower_is_better("train.early_stop_metric", name, at.evaluations[-1][1].values)
        at.worse = 0 if value < at.best else at.worse + 1
        at.best = min(at.best, value)
        return at.worse >= train.early_stop_patience
