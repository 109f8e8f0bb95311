"""python -m dsft.job RUN: one process of a run, from its folder alone; the launchers start it on every rank."""

import contextlib
import errno
import io
import os
import socket
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft_launchers import verdict
from dsft_launchers.attempt import SUPERVISED
from dsft_launchers.codes import CRASHED, DONE, STOPPED
from dsft_launchers.join import resolve

from dsft import folder
from dsft.compose import load_yaml, read
from dsft.entry import collect_again, enter
from dsft.telemetry.record import State, read_status, write_status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dsft.checkpoint.lease import Lease
    from dsft.comm.world import World
    from dsft.config import Run
    from dsft.data.open import Dataset
    from dsft.engine.assemble import Session
    from dsft.engine.keep import Keeper
    from dsft.engine.progress import Watch
    from dsft.models.files import ModelFiles


@dataclass
class Attempt:
    """What a crash is counted against. started: the step of the checkpoint resumed from, 0 for none."""

    number: int = 0
    started: int = 0
    keeper: "Keeper | None" = None
    lease: "Lease | None" = None
    training: bool = False

    def blames(self, error: Exception) -> bool:
        """True if error may be the checkpoint's doing: training from it raised before it was saved again.

        Not the disk's, not the memory's, not a lost peer's.
        """
        import torch

        innocent = isinstance(error, OSError | MemoryError | torch.OutOfMemoryError)
        no_progress = self.started > 0 and self.keeper is not None and self.keeper.saved == self.started
        return self.training and no_progress and not innocent and not verdict.CONSEQUENCE.search(str(error))


def main() -> int:
    """Run the rank that the environment names; a task of srun first learns which it is."""
    os.environ.update(resolve("auto", os.environ, devices="auto", nodes=1).variables)
    code = guarded(Path(sys.argv[1]))
    return DONE if code == STOPPED and SUPERVISED in os.environ else code


def guarded(run_dir: Path) -> int:
    """Work, and turn what happened into the exit code; a crash leaves its traceback on stderr and in status.json."""
    from dsft.checkpoint.lease import LeaseLostError
    from dsft.checkpoint.store import Store

    attempt = Attempt()
    sys.stdout, sys.stderr = Spoken(sys.stdout), Spoken(sys.stderr)
    try:
        return work(run_dir, attempt)
    except verdict.CannotBeginError as error:  # the cluster's state, not an error of this process: no traceback
        print(f"{verdict.CANNOT_BEGIN}{error}", file=sys.stderr)
    except LeaseLostError as error:  # the folder is another's now: say so, write nothing
        print(f"dsft: {error}", file=sys.stderr)
    except Exception as error:  # the last fence: whatever went wrong is this attempt's end
        traceback.print_exc()
        print(f"{verdict.CRASH}{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        try:
            if attempt.lease is not None:
                attempt.lease.check()
                fail(run_dir, f"{type(error).__name__}: {error}")
            if attempt.blames(error):
                Store(run_dir).mark_crash(attempt.started, attempt.number)
        except (OSError, LeaseLostError) as why:
            print(f"dsft: nothing more is written to {run_dir}: {why}", file=sys.stderr)
    return CRASHED


def fail(run_dir: Path, reason: str) -> None:
    """Leave the state failed with its reason in status.json, if the run had begun."""
    status = read_status(run_dir)
    if status is not None:
        write_status(run_dir, replace(status, state="failed", reason=reason))


def settle(run_dir: Path, code: int, attempt: int) -> None:
    """After the ranks of attempt have gone: a run that still says running did not end by itself."""
    try:
        _settle(run_dir, code, attempt)
    except OSError as error:
        print(f"dsft: {run_dir / 'status.json'} could not be brought up to date: {error}", file=sys.stderr)


def _settle(run_dir: Path, code: int, attempt: int) -> None:
    status = read_status(run_dir)
    if status is not None and status.state == "running" and status.attempts == attempt:
        state: State = "stopped" if code == STOPPED else "failed"
        write_status(run_dir, replace(status, state=state, reason=f"the launcher ended with code {code}"))


def work(run_dir: Path, attempt: Attempt) -> int:
    """Resume or begin, train, write the result, and return the exit code. Collective over the ranks."""
    _quiet()
    from dsft.checkpoint import lease as leases
    from dsft.comm.hello import greet
    from dsft.comm.world import join, leave
    from dsft.data.order import total_steps
    from dsft.engine.assemble import assemble
    from dsft.engine.loop import fit
    from dsft.engine.progress import STOPPED as ASKED
    from dsft.engine.resume import keeper_for, resume
    from dsft.engine.stop import StopFlag
    from dsft.recorder import Recorder

    run = _asked(run_dir)
    stop = StopFlag(run.train.max_minutes)
    stop.bind()
    world = join()
    hello = greet(world, folder.versions(), socket.gethostname())
    lease, holder = leases.acquire(run_dir / "checkpoints") if world.rank == 0 else (None, None)
    attempt.lease = lease
    files, data = find(run, world, hello)
    total = total_steps(run.train, len(data.train))
    with Recorder(run, run_dir, world, total, lease, hello) as recorder:
        attempt.number = recorder.attempt
        if holder is not None and recorder.overtakes:
            recorder.event("takeover", 0, {"holder": holder})
        session = assemble(run, files, world, total)
        if session.compiler and run.train.compile == "auto":
            recorder.event("compile", 0, {"steps": total})
        who = folder.identity(run_dir, load_yaml(run_dir / "config.yaml"))
        at = resume(session, run_dir, who, lease, total, recorder)
        attempt.started = at.step
        recorder.begin(at.step)
        recorder.event("assembled", at.step, {})
        attempt.keeper = keeper = keeper_for(session, run_dir, who, lease, saved=at.step)
        attempt.training = True
        collect_again()
        at = fit(session, data, recorder, stop, keeper, at)
        attempt.training = False
        if at.state != ASKED:
            give_result(session, data, run_dir, lease, recorder)
        elif run.checkpoint.every and keeper.saved != at.step:
            raise RuntimeError(f"stopped at step {at.step}, which could not be saved; step {keeper.saved} was")
        recorder.end(at, data, keeper.saved)
    session.run.strategy.close()
    leave()
    stop.ignore()
    return STOPPED if at.state == ASKED else DONE


def _asked(run_dir: Path) -> "Run":
    """What the folder asks for. It was checked where it was made: what is wrong here is a package that is missing."""
    try:
        return read(run_dir)
    except ValueError as error:
        raise verdict.CannotBeginError(str(error)) from error


def find(run: "Run", world: "World", hello: "Mapping[str, Any]") -> "tuple[ModelFiles, Dataset]":
    """The base model and the data, which are the same on all ranks, else CannotBeginError. Collective."""
    from dsft.comm.hello import require_same
    from dsft.data.open import open_data

    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=run.train.seed)
    if world.size > 1:
        base = {"base model": files.digest()} if world.local_rank == 0 else {}  # ranks of a node see the same files
        require_same(world.gather({**base, "data": data.digest}), hello["ranks"])
    return files, data


def give_result(session: "Session", data: "Dataset", run_dir: Path, lease: "Lease | None", watch: "Watch") -> None:
    """Write the result aside, have it read back, and give it its name if the run is still ours. Collective."""
    from dsft.engine.result import write_result
    from dsft.verify import prove

    place = folder.result_place(run_dir, session.world.gather(lease.token if lease else 0)[0])
    digest = write_result(session, place)
    if session.run.checkpoint.verify_result:
        prove(session, data, run_dir, place, digest, watch)
    if lease is not None:
        lease.check(strict=True)
        folder.publish(place, run_dir / "adapter")


def _quiet() -> None:
    """Libraries' progress bars stay out of the user's terminal and logs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()


class Spoken(io.TextIOBase):
    """A rank's output: a log on a full disk or a terminal that went away loses lines and does not end the run."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Pass on."""
        with self._forgiven():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Pass on."""
        with self._forgiven():
            self.stream.flush()

    def fileno(self) -> int:
        """The stream's."""
        return int(self.stream.fileno())

    def isatty(self) -> bool:
        """The stream's."""
        return bool(self.stream.isatty())

    @contextlib.contextmanager
    def _forgiven(self) -> Any:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE, errno.EIO):
                raise


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        enter(main)
