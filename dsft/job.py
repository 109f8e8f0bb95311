"""python -m dsft.job RUN: one process of a run, from its folder alone; the launchers start it on every rank."""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsft.compose import load_yaml, read
from dsft.config import Run
from dsft.telemetry.record import State, Status, read_status, write_status

if TYPE_CHECKING:
    from dsft.comm.world import World
    from dsft.data.open import Dataset
    from dsft.engine.evaluate import Evaluation
    from dsft.engine.loop import Progress

DONE, STOPPED, CRASHED = 0, 75, 76


def main() -> int:
    """Run the rank that the environment names."""
    return guarded(Path(sys.argv[1]))


def guarded(run_dir: Path) -> int:
    """Work, and turn what happened into the exit code; a crash leaves its traceback on stderr and in status.json."""
    try:
        return work(run_dir)
    except Exception as error:  # the last fence: whatever went wrong is this attempt's end
        traceback.print_exc()
        if int(os.environ.get("RANK", "0")) == 0:
            fail(run_dir, f"{type(error).__name__}: {error}")
        return CRASHED


def fail(run_dir: Path, reason: str) -> None:
    """Leave the state failed with its reason in status.json, if the run had begun."""
    status = read_status(run_dir)
    if status is not None:
        write_status(run_dir, replace(status, state="failed", reason=reason))


def settle(run_dir: Path, code: int) -> None:
    """After the ranks have gone: a run that still says running did not end by itself."""
    status = read_status(run_dir)
    if status is not None and status.state == "running":
        state: State = "stopped" if code == STOPPED else "failed"
        write_status(run_dir, replace(status, state=state, reason=f"the launcher ended with code {code}"))


def work(run_dir: Path) -> int:
    """Train, write the result, and return the exit code. Collective over the ranks."""
    _quiet()
    from dsft.comm.world import join, leave
    from dsft.data.open import open_data
    from dsft.data.order import steps_for
    from dsft.engine.assemble import assemble
    from dsft.engine.loop import STOPPED as ASKED
    from dsft.engine.loop import fit
    from dsft.engine.result import write_result
    from dsft.engine.stop import StopFlag

    run = read(run_dir)
    stop = StopFlag()
    stop.bind()
    world = join()
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=run.train.seed)
    rows, batch = len(data.train), run.train.global_batch_size
    total = run.train.steps or steps_for(run.train.epochs or 1.0, num_rows=rows, batch_size=batch)
    with Recorder(run, run_dir, world, data, total) as recorder:
        session = assemble(run, files, world)
        recorder.event("assembled", 0, {})
        at = fit(session, data, total, recorder, stop)
        if at.state != ASKED:
            write_result(session, run_dir / "adapter")
        recorder.end(at)
    session.run.strategy.close()
    leave()
    return STOPPED if at.state == ASKED else DONE


def _quiet() -> None:
    """Libraries' progress bars stay out of the user's terminal and logs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()


class Recorder:
    """What the run tells the outside; only rank 0 writes. A Watch for the loop."""

    def __init__(self, run: Run, run_dir: Path, world: "World", data: "Dataset", total: int) -> None:
        from dsft.telemetry.meter import Meter
        from dsft.telemetry.progress import ProgressLine
        from dsft.telemetry.record import RunRecord
        from dsft.telemetry.trackers import Trackers

        self.run, self.run_dir, self.world, self.data, self.total = run, run_dir, world, data, total
        self.meter = Meter()
        who = world.gather({"rank": world.rank, "pid": os.getpid(), "host": socket.gethostname()})
        self.writes = world.rank == 0
        if not self.writes:
            return
        before = read_status(run_dir)
        attempts = before.attempts + 1 if before else 1
        self.record = RunRecord(run_dir, resumed_from=0)
        self.line = ProgressLine(total, done=0, stream=sys.stdout)
        self.trackers = Trackers(run.tracker, lambda name, message: self.line.say(message))
        known = before.wandb_id if before else None
        wandb_id = self.trackers.open(run_dir, load_yaml(run_dir / "config.yaml"), known)
        self.status = Status(
            state="running", step=0, attempts=attempts, checkpoint=None, reason=None, wandb_id=wandb_id
        )
        write_status(run_dir, self.status)
        self.record.event("start", 0, {"ranks": who, "steps": total, "attempt": attempts})

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self.trackers.close()
            self.line.close()
            self.record.close()

    def begin_step(self) -> None:
        """A step begins."""
        self.meter.start()

    def step(self, step: int, values: Mapping[str, float], ids: list[str]) -> None:
        """One training step is over. Collective: the memory is the largest of all ranks."""
        from dsft.telemetry.meter import peak_memory_bytes

        timed = self.meter.stop(values["tokens"])
        peak = self.world.max(peak_memory_bytes(self.world.device))
        if not self.writes:
            return
        line = {**values, **timed, "peak_memory_bytes": int(peak)}
        self.record.metrics(step, line)
        if self.run.train.log_samples:
            self.record.samples(step, ids)
        self.trackers.log(step, line)
        self.line.step(step, line)
        self.status = replace(self.status, step=step)
        write_status(self.run_dir, self.status)

    def evaluation(self, step: int, evaluation: "Evaluation") -> None:
        """One evaluation is over."""
        if self.writes:
            self.record.metrics(step, evaluation.values)
            self.trackers.log(step, evaluation.values)
            said = "  ".join(f"{key} {value:.4f}" for key, value in evaluation.values.items())
            self.line.say(f"step {step}  {said}")

    def event(self, event: str, step: int, details: Mapping[str, object]) -> None:
        """Something happened."""
        if self.writes:
            self.record.event(event, step, details)
            if event in ("nonfinite", "early_stop"):
                self.line.say(f"step {step}  {event}  " + "  ".join(f"{key} {value}" for key, value in details.items()))

    def end(self, at: "Progress") -> None:
        """The run is over: done, or stopped on request."""
        if not self.writes:
            return
        state: State = "done" if at.state == "done" else "stopped"
        self.status = replace(self.status, state=state, step=at.step, reason=at.reason or None)
        write_status(self.run_dir, self.status)
        self.record.event(state, at.step, {"reason": at.reason} if at.reason else {})
        self.line.close()
        for line in closing(self.run_dir, self.data, at):
            print(line, flush=True)


def closing(run_dir: Path, data: "Dataset", at: "Progress") -> Iterator[str]:
    """What a person wants to see at the end: before and after, answers side by side, where the result is."""
    if at.state != "done":
        yield f"stopped at step {at.step} ({at.reason}); the same command starts it again from step 1"
        return
    if at.evaluations:
        first, last = at.evaluations[0][1], at.evaluations[-1][1]
        for key, before in first.values.items():
            yield f"{key:<14} {before:.4f} before, {last.values[key]:.4f} after"
        assert data.eval is not None
        for before_answer, after_answer in list(zip(first.answers, last.answers, strict=True))[:5]:
            row = before_answer.row
            yield f"  right answer {data.eval.reference(row)!r}"
            yield f"    before {before_answer.text[:70]!r}  after {after_answer.text[:70]!r}"
    yield f"result         {run_dir / 'adapter'}"


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
