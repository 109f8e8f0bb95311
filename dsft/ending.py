"""How an attempt at a run ends: what it is counted against, and what status.json says of it."""

import os
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsft_launchers import verdict
from dsft_launchers.attempt import SUPERVISED
from dsft_launchers.codes import DIVERGED, STOPPED
from dsft_launchers.local import Ending
from dsft_launchers.shown import say, shown

from dsft.telemetry.record import State, read_status, write_status

if TYPE_CHECKING:
    from dsft.checkpoint.lease import Lease
    from dsft.engine.keep import Keeper
    from dsft.engine.progress import Progress


@dataclass
class Attempt:
    """The facts that a crash is judged by. started: the step of the checkpoint resumed from, 0 for none.

    at: where the loop is. lease: rank 0's, from when it holds the run folder.
    """

    number: int = 0
    started: int = 0
    keeper: "Keeper | None" = None
    lease: "Lease | None" = None
    at: "Progress | None" = None
    training: bool = False

    def counts(self, error: Exception) -> bool:
        """Return True if error may be the doing of what was loaded: it was raised while training.

        Errors of the disk, of the memory, and of a lost peer are not.
        """
        import torch

        from dsft.comm.world import lost_peer

        innocent = isinstance(error, OSError | MemoryError | torch.OutOfMemoryError) or lost_peer(error)
        return self.training and not innocent

    @property
    def blamed(self) -> int:
        """The step of the checkpoint that a crash speaks against; 0 if the run has saved another since."""
        return self.started if self.keeper is not None and self.keeper.saved == self.started else 0


def crashed(run_dir: Path, attempt: Attempt, error: Exception) -> None:
    """Say what this rank crashed of, and count it; rank 0 notes it, or the cause that another rank has left."""
    from dsft.checkpoint.lease import LeaseLostError
    from dsft.checkpoint.store import Store
    from dsft.comm.meeting import cause_left, leave_cause
    from dsft.comm.world import lost_peer

    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    lost = lost_peer(error)
    print(shown(traceback.format_exc()), end="", file=sys.stderr)
    say(f"{verdict.LOST_PEER if lost else verdict.CRASH}{line}")
    if not lost:
        leave_cause(f"rank {os.environ.get('RANK', '0')}: {line}")
    note(run_dir, attempt, (cause_left() or f"lost a peer: {line}") if lost else line)
    try:
        if attempt.at is not None and attempt.counts(error):
            Store(run_dir).mark_crash(attempt.blamed, attempt.number, attempt.at.step)
        if attempt.lease is not None:
            attempt.lease.check()
            if (settled := Store(run_dir).settle_trial()) is not None:
                said = f"{settled.details['checkpoint']} {settled.event.replace('_', ' ')}: {settled.details['reason']}"
                say(f"dsft: {said}")
    except (OSError, LeaseLostError) as why:
        say(f"dsft: nothing more is written to {run_dir}: {why}")


def note(run_dir: Path, attempt: Attempt, reason: str, state: State = "failed") -> None:
    """Leave the state and its reason in status.json, if rank 0 holds the run; a supervisor does so itself."""
    from dsft.checkpoint.lease import LeaseLostError

    if attempt.lease is None or SUPERVISED in os.environ:
        return
    try:
        attempt.lease.check()
        status = read_status(run_dir)
        if status is not None:
            write_status(run_dir, replace(status, state=state, reason=reason))
    except (OSError, LeaseLostError) as why:
        say(f"dsft: nothing more is written to {run_dir}: {why}")


def settle(run_dir: Path, ending: Ending, attempt: int) -> None:
    """After the ranks of attempt have gone: write why into status.json, as the launcher saw it of all of them.

    A run that is done or stopped has said so itself; one that another start works on is left alone.
    """
    from dsft.checkpoint import lease

    try:
        lease.refuse_living(run_dir / "checkpoints", os.environ)
        status = read_status(run_dir)
        if status is None or status.state in ("done", "stopped") or status.attempts > attempt:
            return
        states: dict[int, State] = {STOPPED: "stopped", DIVERGED: "diverged"}
        state = states.get(ending.code, "failed")
        reason = ending.reason or status.reason or f"the launcher ended with code {ending.code}"
        write_status(run_dir, replace(status, state=state, reason=reason))
    except lease.HeldError:
        return
    except OSError as error:
        say(f"dsft: {run_dir / 'status.json'} could not be brought up to date: {error}")
