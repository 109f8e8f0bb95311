"""One optimizer step: prepare, count, forward and backward over the micro-batches, update."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsft.comm.devices import sent
from dsft.engine.assemble import Session
from dsft.engine.forward import forward
from dsft.engine.guided import move
from dsft.engine.parts import Part, mark
from dsft.engine.roles import require_start
from dsft.engine.tally import Measured, Tally, counted, per_unit
from dsft.objective import Batch


@dataclass(frozen=True)
class StepResult(Measured):
    """Measured before the update. grad_norm: before clipping.

    moved is False where a NaN or Inf in loss or gradient, on any rank, kept the update from happening, or would have
    (optim.in_backward). penalty: what the method adds to the loss that is trained on; NaN if it adds nothing.
    """

    grad_norm: float
    moved: bool
    penalty: float


def train_step(
    session: Session, batches: Sequence[Batch], step: int, lr_scale: float, settle: Callable[[], None] = lambda: None
) -> StepResult:
    """Forward and backward over this rank's micro-batches, then one update; every rank returns the same result.

    settle returns once parameters and moments may move: a save may still be copying them.
    """
    run, world = session.run, session.world
    batches = run.objective.prepare(session.roles, batches)
    totals = world.sum(sent(counted(run.objective, batches), world.device))
    counts = per_unit(totals)
    tally = Tally(run.objective, world.device)
    session.model.train()
    if session.guided:
        session.guided.course.begin_step(step)
    for index, batch in enumerate(batches):
        terms, metrics = forward(session, step, index, batch)
        last = index == len(batches) - 1
        if last and run.optim.in_backward:
            settle()
            run.strategy.release(lr_scale)
        share = (terms / counts.to(terms.dtype)).sum()
        run.strategy.backward(share, last=last)
        tally.add(terms, metrics, counts=batch.counts)
    found = tally.measured(world, totals)
    require_start(run, step, found)
    grad_norm = penalty = math.nan
    if math.isfinite(found.loss):
        settle()
        with mark(Part.OPTIMIZER):
            grad_norm, penalty = move(session.guided, run, step, lr_scale)
    else:
        run.strategy.drop()
    moved = math.isfinite(found.loss) and math.isfinite(grad_norm)
    return StepResult(**vars(found), grad_norm=grad_norm, moved=moved, penalty=penalty)
