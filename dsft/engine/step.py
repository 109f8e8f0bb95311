"""One optimizer step. This file alone divides: loss = sum over ranks and micro-batches / count over the same."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dsft.comm.devices import sent
from dsft.engine.assemble import Session
from dsft.engine.forward import forward
from dsft.engine.guided import move
from dsft.engine.parts import Part, mark
from dsft.objective import Batch


@dataclass(frozen=True)
class StepResult:
    """loss: before the update, per unit of the objective; grad_norm: before clipping; tokens: over all ranks.

    moved is False where a NaN or Inf in loss or gradient, on any rank, kept the update from happening, or would have
    (optim.in_backward). penalty: what the method adds to the loss that is trained on; NaN if it adds nothing.
    """

    loss: float
    grad_norm: float
    tokens: int
    supervised: int
    moved: bool
    penalty: float


def train_step(
    session: Session, batches: Sequence[Batch], step: int, lr_scale: float, settle: Callable[[], None] = lambda: None
) -> StepResult:
    """Forward and backward over this rank's micro-batches, then one update; every rank returns the same result.

    settle returns once parameters and moments may move: a save may still be copying them.
    """
    run, world = session.run, session.world
    tokens = torch.tensor([float(sum(b.tokens.numel() for b in batches))], dtype=torch.float64)
    local = torch.stack([run.objective.count(batch) for batch in batches]).sum(0)
    totals = world.sum(sent(torch.cat([local, tokens]), world.device))
    counts = totals[:-1].clamp(min=1)
    sums = torch.zeros_like(counts)
    session.model.train()
    if session.guided:
        session.guided.course.begin_step(step)
    for index, batch in enumerate(batches):
        terms = forward(session, step, index, batch)
        last = index == len(batches) - 1
        if last and run.optim.in_backward:
            settle()
            run.strategy.release(lr_scale)
        share = (terms / counts.to(terms.dtype)).sum()
        run.strategy.backward(share, last=last)
        sums += terms.detach().double()
    mean = (world.sum(sums) / counts).sum()
    loss, supervised, *_, count = torch.cat([mean.reshape(1), totals]).tolist()  # the host waits, once
    grad_norm = penalty = math.nan
    if math.isfinite(loss):
        settle()
        with mark(Part.OPTIMIZER):
            grad_norm, penalty = move(session.guided, run, step, lr_scale)
    else:
        run.strategy.drop()
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        tokens=int(count),
        supervised=int(supervised),
        moved=math.isfinite(loss) and math.isfinite(grad_norm),
        penalty=penalty,
    )
