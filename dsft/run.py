"""python -m dsft.run [overrides]: compose, check, launch, train, evaluate, export, report."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft_launchers.codes import CRASHED, STOPPED, USER_ERROR
from dsft_launchers.verdict import CANNOT_BEGIN, CannotBeginError
from rich.console import Console

from dsft import dispatch, folder, offline
from dsft.compose import Composed, compose, hand_to_hydra, hydra_flags
from dsft.config import Run
from dsft.entry import enter
from dsft.wording import refuse

if TYPE_CHECKING:
    from dsft.data.open import Dataset
    from dsft.models.files import ModelFiles


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
    prepared = _preflight(composed)
    if prepared is None:
        return 0
    run_dir = Path(composed.run.run_dir)

    def begin() -> None:
        _announce(composed, prepared)
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
            prepared = _preflight(composed)
            done, run_dir = prepared is None, str(Path(composed.run.run_dir).absolute())
            if prepared is not None:
                _announce(composed, prepared)
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


def _preflight(composed: Composed) -> dict[str, Any] | None:
    """All that can be known without weights, cheapest first; None if the folder's run is done already.

    Raises ValueError for what cannot work. Writes nothing but caches.
    """
    run, run_dir = composed.run, Path(composed.run.run_dir)
    if composed.start.kind == "slurm":
        offline.unplug()  # what the nodes would lack is missed here
    folder.check(run_dir, composed.resolved)
    done = bool(folder.state(run_dir)) and folder.check_length(run_dir, composed.resolved)
    run.model.check()
    for tracker in run.tracker.values():
        tracker.check()
    run.data.check()
    files = run.model.resolve()
    from dsft.data.open import open_data

    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=run.train.seed)
    _check_fit(run, files, data)
    digests = {"base_digest": files.digest(), "data_digest": data.digest}
    folder.check_digests(run_dir, digests, composed.resolved)
    if done:
        print(f"{run_dir} is done already; its result is in {run_dir / 'adapter'}")
        return None
    from dsft.plan import make_plan

    plan = make_plan(composed, files)
    folder.check_parameters(run_dir, plan)
    return {"plan": plan, "digests": digests, "audit": data.audit}


def _check_fit(run: Run, files: "ModelFiles", data: "Dataset") -> None:
    """Refuse rows beyond the model's reach, and a metric that these data do not give."""
    shape, longest = files.config, int(data.train.lengths.max())
    reach = getattr(shape, "max_position_embeddings", None)
    if reach is not None and longest > reach:
        raise ValueError(
            f"train.max_length must be at most {reach}, the positions that the model knows, got rows of {longest} "
            f"tokens with train.max_length={run.train.max_length}; lower it"
        )
    metric = run.train.early_stop_metric
    if metric is not None and (data.eval is None or (metric == "eval/accuracy" and not data.verifiable)):
        raise ValueError(
            f"train.early_stop_metric={metric} needs held-out rows that give it; hold some out or unset it"
        )


def _announce(composed: Composed, prepared: Mapping[str, Any]) -> None:
    from dsft.plan import as_text

    print(as_text(prepared["plan"]))
    for note in folder.notes(Path(composed.run.run_dir), composed.resolved):
        print(f"note         {note}")
    if composed.run.checkpoint.every == 0:
        print("note         no checkpoints (checkpoint.every=0): a run that is stopped begins again at step 1")
    for tracker in composed.run.tracker.values():
        if hasattr(tracker, "why"):
            print(f"tracker      {tracker.why().removeprefix('tracker=')}")
    for line in prepared["audit"].lines():
        print(line)
    console = Console(highlight=False, soft_wrap=True)
    console.print("an example, what is supervised in green:", style="bold")
    console.print(prepared["audit"].coloured())
    print(f"run folder   {composed.run.run_dir}", flush=True)


if __name__ == "__main__":
    enter(main)
