"""python -m dsft.run [overrides]: compose, check, launch, train, evaluate, export, report."""

import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from dsft_launchers.codes import CRASHED, DONE, STOPPED, USER_ERROR
from dsft_launchers.join import ON_CPUS, VISIBLE
from dsft_launchers.shown import in_a_line, say
from dsft_launchers.verdict import CANNOT_BEGIN, CannotBeginError

from dsft import __version__, dispatch, folder, owners
from dsft.checkpoint import lease
from dsft.compose import Composed, compose, hand_to_hydra
from dsft.entry import BEGUN, enter, lose_lines
from dsft.flags import hydra_flags
from dsft.idle import refuse_of_a_sweep
from dsft.preflight import announce, create, preflight, rehearse, tell_unchecked
from dsft.searched import own_folder_last, python
from dsft.wording import refuse


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was typed; returns the exit code (see the README)."""
    given = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in given if word != owners.TRUST]
    trust = len(words) < len(given)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _interrupt)
    try:
        flags, overrides = hydra_flags(words)
        if "--version" in flags:
            print(f"dsft {__version__}")
            return DONE
        if flags:
            return hand_to_hydra(flags, trust=trust)
        if BEGUN not in os.environ:  # a point of a sweep has the words of its sweep
            refuse_of_a_sweep(overrides)
        composed = compose(overrides)
        if composed.run.launcher.gpus == ON_CPUS:
            os.environ[VISIBLE] = ""  # for the ranks too
        if composed.start.variables:
            return _join(composed, trust=trust)
        return _start(composed, trust=trust)
    except ValueError as error:
        return refuse(error)
    except KeyboardInterrupt:  # before the ranks are bound to it; afterwards it stops them at the next step
        say("dsft: stopped before the run began")
        return STOPPED


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Before the ranks are bound to a signal it stops the start as Ctrl-C does."""
    raise KeyboardInterrupt


def _start(composed: Composed, *, trust: bool) -> int:
    """Check, make the run folder, and start the processes: in this one if it is alone."""
    run_dir = Path(composed.run.run_dir)
    if dispatch.is_dry(composed):
        unchecked = rehearse(composed)
        dispatch.show(composed)
        tell_unchecked(unchecked)
        return DONE
    owners.check(run_dir, "run_dir", trust=trust)
    folder.check_place(run_dir)
    os.environ[lease.START] = uuid.uuid4().hex  # what this start holds is its ranks' at once
    if composed.start.kind == "slurm":
        dispatch.check(composed)
    _refuse_living(composed)
    prepared = preflight(composed)
    if prepared is None:
        return _done(run_dir)

    def begin() -> None:
        if BEGUN in os.environ:
            lose_lines()
        try:
            announce(composed, prepared)
        except BrokenPipeError:  # from here on, lines are lost and the run goes on
            say("dsft: the reader of the output is gone; stopped before the run began")
            raise
        lose_lines()
        create(run_dir, composed, prepared)

    if composed.start.kind == "slurm":
        return dispatch.dispatch(composed, begin)
    with _claim(composed).beating():
        begin()
        return _launch(run_dir, composed.start.size)


def _launch(run_dir: Path, size: int) -> int:
    """Run the processes of this machine, in this one if it is alone; the exit code."""
    if size == 1:
        from dsft import job

        return job.guarded(run_dir)
    from dsft_launchers.local import run_ranks

    from dsft.ending import settle

    command = [*python("dsft.job"), str(run_dir)]
    attempt = folder.state(run_dir).get("attempts", 0) + 1
    ending = run_ranks(command, num_processes=size, log_dir=run_dir / "logs", env={})
    settle(run_dir, ending, attempt)
    return ending.code


def _refuse_living(composed: Composed) -> None:
    """Refuse a folder that the process of another start works on, or that a SLURM job waits to work on."""
    run_dir = Path(composed.run.run_dir).absolute()
    if composed.run.resume.takeover:
        return
    dispatch.refuse_second(run_dir)
    lease.refuse_living(run_dir / "checkpoints", os.environ)


def _claim(composed: Composed) -> lease.Lease:
    """Take the run folder for this start, so that a second one that is typed in the same moment is refused."""
    return lease.claim(Path(composed.run.run_dir) / "checkpoints", os.environ, takeover=composed.run.resume.takeover)


def _done(run_dir: Path) -> int:
    best = folder.state(run_dir).get("best")
    whose = f", of step {best['step']}, the best by {best['metric']}" if best else ""
    print(in_a_line(f"{run_dir} is done already; its result is in {run_dir / 'adapter'}{whose}"))
    return 0


def _join(composed: Composed, *, trust: bool) -> int:
    """This process is a rank that torchrun or srun started: rank 0 checks and makes the folder for all."""
    lose_lines()
    os.environ.update(composed.start.variables)
    from dsft import job
    from dsft.comm.world import join, leave

    try:
        world = join(job.DAY_S)  # rank 0 may tokenise for long; each phase after it has a limit of its own
    except CannotBeginError as error:
        say(f"{CANNOT_BEGIN}{error}")
        return CRASHED
    refusal, run_dir, done = None, "", False
    if world.rank == 0:
        try:
            owners.check(Path(composed.run.run_dir), "run_dir", trust=trust)
            folder.check_place(Path(composed.run.run_dir))
            _refuse_living(composed)
            prepared = preflight(composed)
            done, run_dir = prepared is None, str(Path(composed.run.run_dir).absolute())
            if prepared is None:
                _done(Path(run_dir))
            else:
                _claim(composed)
                announce(composed, prepared)
                create(Path(run_dir), composed, prepared)
        except ValueError as error:
            refusal = str(error)
    refusal, run_dir, done = world.gather((refusal, run_dir, done))[0]
    if refusal is None and not done:
        return job.guarded(Path(run_dir))
    leave()
    if refusal is not None:
        return refuse(ValueError(refusal)) if world.rank == 0 else USER_ERROR
    return 0


if __name__ == "__main__":
    own_folder_last(inherited=BEGUN in os.environ)
    enter(main)
