"""python -m dsft.run [overrides]: compose, check, launch, train, evaluate, export, report."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dsft_launchers.codes import CRASHED, STOPPED, USER_ERROR
from dsft_launchers.verdict import CANNOT_BEGIN, CannotBeginError

from dsft import dispatch, folder
from dsft.compose import Composed, compose, hand_to_hydra, hydra_flags
from dsft.entry import enter
from dsft.preflight import announce, preflight
from dsft.wording import refuse


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was typed; returns the exit code (see the README)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        flags, overrides = hydra_flags(words)
        if flags:
            return hand_to_hydra(flags)
        composed = compose(overrides)
        if composed.start.variables:
            return _join(composed)
        return _start(composed)
    except ValueError as error:
        return refuse(error)
    except KeyboardInterrupt:  # before the ranks are bound to it; afterwards it stops them at the next step
        print("dsft: stopped before the run began", file=sys.stderr)
        return STOPPED


def _start(composed: Composed) -> int:
    """Check, make the run folder, and start the processes: in this one if it is alone."""
    if composed.start.kind == "slurm":
        dispatch.check(composed)
    prepared, run_dir = preflight(composed), Path(composed.run.run_dir)
    if prepared is None:
        return _done(run_dir)

    def begin() -> None:
        announce(composed, prepared)
        folder.create(run_dir, composed, prepared["plan"], prepared["digests"])

    if composed.start.kind == "slurm":
        return dispatch.dispatch(composed, begin)
    begin()
    from dsft import job

    if composed.start.size == 1:
        return job.guarded(run_dir)
    from dsft_launchers.local import launch

    command = [sys.executable, "-m", "dsft.job", str(run_dir)]
    attempt = folder.state(run_dir).get("attempts", 0) + 1
    code = launch(command, num_processes=composed.start.size, log_dir=run_dir / "logs", env={})
    job.settle(run_dir, code, attempt)
    return code


def _done(run_dir: Path) -> int:
    print(f"{run_dir} is done already; its result is in {run_dir / 'adapter'}")
    return 0


def _join(composed: Composed) -> int:
    """This process is a rank that torchrun or srun started: rank 0 checks and makes the folder for all."""
    os.environ.update(composed.start.variables)
    from dsft import job
    from dsft.comm.world import join, leave

    try:
        world = join()
    except CannotBeginError as error:
        print(f"{CANNOT_BEGIN}{error}", file=sys.stderr)
        return CRASHED
    refusal, run_dir, done = None, "", False
    if world.rank == 0:
        try:
            prepared = preflight(composed)
            done, run_dir = prepared is None, str(Path(composed.run.run_dir).absolute())
            if prepared is None:
                _done(Path(run_dir))
            else:
                announce(composed, prepared)
                folder.create(Path(run_dir), composed, prepared["plan"], prepared["digests"])
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
    enter(main)
