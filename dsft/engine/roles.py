"""Roles: values of what learns, other than the policy's own, under which a model is asked for scores.

A role is a copy of this rank's part of what learns, and no second model: the reference of a preference loss is the
policy as it was before the first step, for every method and strategy.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from dsft_launchers.verdict import RefusedError
from torch import Tensor, nn

from dsft.comm.devices import sent
from dsft.comm.world import World
from dsft.config import Run
from dsft.data.tokens import SCORES
from dsft.engine.precision import cast
from dsft.engine.tally import Measured
from dsft.models.scorer import Scorer
from dsft.objective import POLICY, START, Batch

BOUNDS = {"fp32": 1e-6, "bf16": 0.05}
"""How far a measure that is 0 before the first update may be from it, by precision: sums are rounded."""

COMPUTED_APART = {"fp32": 1e-4, "bf16": 0.05}
"""The same where the scores of a role were computed in other micro-batches."""


class Roles:
    """Gives scores by the values of a role. Implements Passes of dsft/objective.py.

    values: by role, this rank's part of each tensor that learns, in the order of Strategy.parts. between: called before
    each forward pass; what it raises ends the passes. settle: called before a role's values change places with the
    policy's, and returns once no save is copying these.
    """

    def __init__(self, run: Run, module: nn.Module, scorer: Scorer, world: World) -> None:
        self.run, self.module, self.scorer, self.world = run, module, scorer, world
        self.values: dict[str, list[Tensor]] = {}
        self.between: Callable[[], None] = lambda: None
        self.settle: Callable[[], None] = lambda: None

    def keep(self) -> None:
        """Copy what learns as it is now, if the objective names the role: before a step, and before a checkpoint."""
        if START in self.run.objective.roles:
            self.values[START] = self.run.strategy.snapshot()

    def score(self, role: str, batches: Sequence[Batch]) -> list[Tensor]:
        """For each batch the scores (P,) by the values of a role, on the device, without dropout. Collective."""
        if role == START and all(SCORES in batch.columns for batch in batches):
            return [sent(batch.columns[SCORES], self.world.device) for batch in batches]
        self.module.eval()
        if role != POLICY:
            self.settle()
        shown = nullcontext() if role == POLICY else self.run.strategy.showing(self.values[role])
        with shown, torch.no_grad(), cast(self.run.train.precision, self.world.device):
            return [self._score(batch) for batch in batches]

    def _score(self, batch: Batch) -> Tensor:
        self.between()
        return self.scorer.score(batch.to(self.world.device))

    def sum(self, value: Tensor) -> Tensor:
        """Sum of value over all ranks. Collective."""
        return self.world.sum(value)

    @contextmanager
    def interrupted(self, between: Callable[[], None]) -> Iterator[None]:
        """Within it, between is called before each forward pass."""
        self.between = between
        try:
            yield
        finally:
            self.between = lambda: None


def require_start(run: Run, step: int, found: Measured) -> None:
    """Require that, at step 1, measures are 0 that the objective says are. Raises RefusedError on every rank."""
    bound = (COMPUTED_APART if run.objective.reference_cache else BOUNDS)[run.train.precision]
    for name in run.objective.at_start if step == 1 and run.objective.reference == START else ():
        if not abs(found.measures[name]) <= bound:
            raise RefusedError(
                f"{name} must be 0 before the first update, as policy and reference are then the same values, got "
                f"{found.measures[name]:.3g} (bound {bound:g}): a forward pass draws random numbers or depends on what "
                "was computed before it; take another method or model, and tell the authors of dsft"
            )
