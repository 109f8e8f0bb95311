"""Faults that turn cells of the equality matrix red."""

import os
import signal
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dsft.comm.world import World
from dsft.engine.assemble import Session
from dsft.engine.dropout import Keyed
from dsft.objective import START


class LocalCounts(World):
    """A planted fault: the loss is divided by this rank's own count."""

    def sum(self, value: Tensor) -> Tensor:
        return value


def plant(session: Session, fault: str | None) -> Session:
    """The session with a fault in it, on the ranks that have it."""
    world = session.world
    if fault == "local-counts":
        return replace(session, world=LocalCounts(world.rank, world.size, world.local_rank, world.device))
    if fault is not None:
        _PLANTED[fault](session)
    return session


def _lost_gradients(session: Session) -> None:
    strategy = session.run.strategy
    whole = strategy.backward
    if session.world.rank == 1:
        object.__setattr__(strategy, "backward", lambda loss, *, last: whole(loss * 0, last=last))


def _silent_counts(session: Session) -> None:
    """Micro-batches of a rank that only keeps up are taken for its own."""
    objective = session.run.objective
    prepare = objective.prepare

    def loud(passes: Any, batches: Any) -> Any:
        return [replace(batch, counts=True) for batch in prepare(passes, batches)]

    object.__setattr__(objective, "prepare", loud)


def _other_reference(session: Session) -> None:
    """Rank 1 holds other values of the reference."""
    for value in session.roles.values[START] if session.world.rank == 1 else ():
        value.add_(0.01)


def _torch_dropout(session: Session) -> None:
    """Masks are drawn per micro-batch."""
    session.draws.functional, session.draws.watched = None, True
    for module in session.model.modules():
        if isinstance(module, Keyed):
            module.__class__ = nn.Dropout


def _raises(session: Session) -> None:
    if session.world.rank == 1:
        raise RuntimeError("planted\nwith a second line")


def _dies(session: Session) -> None:
    if session.world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


_PLANTED = {
    "lost-gradients": _lost_gradients,
    "silent-counts": _silent_counts,
    "other-reference": _other_reference,
    "torch-dropout": _torch_dropout,
    "raises": _raises,
    "dies": _dies,
}
