"""What a run tells the outside: files, trackers, the terminal; and what a person sees at the end."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from dsft_launchers.shown import shown

from dsft import folder
from dsft.again import command_of
from dsft.checkpoint.lease import Lease, LeaseLostError
from dsft.comm.hello import odd
from dsft.comm.world import World
from dsft.compose import load_yaml
from dsft.config import Run
from dsft.data.open import Dataset
from dsft.engine.evaluate import Evaluation
from dsft.engine.progress import STOPPED, Progress
from dsft.privacy import for_trackers
from dsft.telemetry.meter import Meter, peak_memory_bytes
from dsft.telemetry.progress import ProgressLine
from dsft.telemetry.record import METRICS, Best, RunRecord, Saved, State, Status, read_lines, read_status, timestamp
from dsft.telemetry.trackers import Trackers

SAID = {
    "nonfinite": "nothing was updated: loss {loss}, gradient norm {grad_norm}; {skipped} such steps so far",
    "early_stop": "stops early: {metric} has not improved on {best:.4f}",
    "best": "the best so far: {metric} {value:.4f}{beside}",
    "back_to_best": "the result is the model of this step, the best; the last was step {last}",
    "resume": "resumed from {checkpoint}",
    "optimizer_anew": "the optimizer begins anew: the checkpoint holds the state of {was}, this run takes {now}",
    "clock": "THE CLOCK OF {host} is {seconds:+.1f} s off rank 0's: times in its logs and files mislead",
    "slow_node": "SLOW NODE {host}: an all-reduce {what} takes {seconds:.3f} s, {median:.3f} s on the median node",
    "takeover": "took the run folder over from {holder}",
    "quarantine": "CHECKPOINT SET ASIDE: {checkpoint}: {reason}; it is in {moved_to} now",
    "put_back": "CHECKPOINT PUT BACK: {checkpoint}: {reason}",
    "condemned": "{checkpoint} stays set aside: {reason}; it is in {moved_to}",
    "verified": "the result was read back in a fresh process: it is the model that was trained",
    "unverifiable": "the result will not be compared with the model, its tensors alone will: {reason}",
    "unverified": "the result was not read back: {reason}",
    "compile": "train.compile=auto: {steps:,} steps are worth it, blocks are compiled",
    "compiled": "{graphs} graphs compiled in {seconds:.0f} s",
    "profile": "{what}\n{table}",
    "profile_short": "train.profile={wanted}: {steps} steps are left to be profiled",
    "save_failed": "SAVE FAILED: {error}; {then}, the newest checkpoint is step {newest}",
    "save_late": "SAVE LATE: that of step {of} has taken {seconds:.0f} s so far, the longest before {longest:.1f} s; "
    "until it ends nothing else is saved, and the newest checkpoint is step {newest}",
    "early_stop_holds": "stopped early at this step before, which still holds; train.early_stop_metric=null goes on",
    "records_aside": "begins again at step 1: metrics.jsonl and samples.jsonl of before are in {moved_to}",
}
"""Events that a person should see, in words."""


class Recorder:
    """A Watch for the loop. Rank 0 writes, and only while the run folder is its own: lease is rank 0's.

    hello: what the event `start` says of the ranks.
    """

    def __init__(
        self, run: Run, run_dir: Path, world: World, total: int, lease: Lease | None, hello: Mapping[str, object]
    ) -> None:
        self.run, self.run_dir, self.world, self.total, self.lease = run, run_dir, world, total, lease
        self.meter = Meter()
        before = read_status(run_dir) if lease is not None else None
        self.overtakes = before is not None and before.state == "running"
        self.attempt = world.gather(before.attempts + 1 if before else 1)[0]
        if lease is None:
            return
        self.line = ProgressLine(total, stream=sys.stdout)
        self.record = RunRecord(
            run_dir, lambda error: self.line.say(f"THE DISK DOES NOT TAKE THE RUN'S RECORDS ({error}); they wait")
        )
        self.trackers = Trackers(run.tracker, lambda name, message: self.line.say(message))
        known = before.wandb_id if before else None
        wandb_id = self.trackers.open(run_dir, for_trackers(load_yaml(run_dir / "config.yaml")), known)
        self.status = Status(
            state="running",
            step=before.step if before else 0,
            attempts=self.attempt,
            checkpoint=before.checkpoint if before else None,
            reason=None,
            wandb_id=wandb_id,
            saved=before.saved if before else None,
            best=before.best if before and before.best and before.best.metric == run.checkpoint.keep_best else None,
        )
        self.record.status(self.status)
        self.record.event("start", 0, {**hello, "steps": total, "attempt": self.attempt})
        for what, details in odd(hello):
            self.event(what, 0, details)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.lease is None:
            return
        self.trackers.close()
        self.line.close()
        try:
            self.lease.check()
            self.record.close()
        except LeaseLostError:
            if kind is None:
                raise
        except OSError as error:  # lines that can no longer be written
            if kind is None:
                raise
            self.line.say(str(error))

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint that status.json knows of; 0 for none, and on other ranks than 0."""
        if self.lease is None or self.status.checkpoint is None:
            return 0
        return int(self.status.checkpoint.removeprefix("step-"))

    def given_up(self, reason: str) -> Progress:
        """Where the run is if it was asked to stop before it resumed: where the last attempt left it. Collective."""
        step = self.world.gather(self.status.step if self.lease else 0)[0]
        self.event("stopping", step, {"reason": reason})
        return Progress(total=self.total, step=step, state=STOPPED, reason=reason)

    def begin(self, step: int) -> None:
        """The loop begins after step: what was recorded of later steps is dropped, since they are run again."""
        if self.lease is not None:
            if step == 0 and any("loss" in line for line in read_lines(self.run_dir / METRICS)):
                self.event("records_aside", 0, {"moved_to": str(folder.set_records_aside(self.run_dir))})
            self.record.resume(step)
            self.line.begin(step)
            self.status = replace(self.status, step=step)
            self.record.status(self.status)

    def begin_step(self) -> None:
        """A step begins."""
        self.meter.start()

    def step(self, step: int, values: Mapping[str, float], ids: list[str]) -> None:
        """One training step is over. Collective: the memory is the largest of all ranks."""
        timed = self.meter.stop(values["tokens"])
        peak = self.world.max(peak_memory_bytes(self.world.device))[0]
        if self.lease is None:
            return
        self.lease.check()
        line = {**values, **timed, "peak_memory_bytes": int(peak)}
        self.record.metrics(step, line)
        if self.run.train.log_samples:
            self.record.samples(step, ids)
        self.trackers.log(step, line)
        self.line.step(step, line)
        self.status = replace(self.status, step=step)
        self.record.status(self.status)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """One evaluation is over."""
        if self.lease is not None:
            self.lease.check()
            self.record.metrics(step, evaluation.values)
            self.trackers.log(step, evaluation.values)
            said = "  ".join(f"{key} {value:.4f}" for key, value in evaluation.values.items())
            self.line.say(f"step {step}  {said}")

    def event(self, event: str, step: int, details: Mapping[str, object]) -> None:
        """Something happened."""
        if self.lease is None:
            return
        self.lease.check()
        self.record.event(event, step, details)
        if event in SAID:
            where = f"step {step}  " if step else ""
            self.line.say(where + SAID[event].format(**details))
        if event in ("save", "resume"):
            checkpoint = str(details["checkpoint"])
            saved = Saved(step=step, time=_committed(self.run_dir, checkpoint))
            self.status = replace(self.status, checkpoint=checkpoint, saved=saved)
            self.record.status(self.status)
        if event == "best":
            best = Best(step=step, metric=str(details["metric"]), value=float(str(details["value"])))
            self.status = replace(self.status, best=best)
            self.record.status(self.status)
        if event == "stopping":
            self.status = replace(self.status, state="stopping", reason=str(details["reason"]))
            self.record.status(self.status)

    def end(self, at: Progress, data: Dataset, saved: int) -> None:
        """The run is over: done, or stopped on request. saved: step of the newest checkpoint."""
        if self.lease is None:
            return
        state: State = "done" if at.state == "done" else "stopped"
        self.status = replace(self.status, state=state, step=at.step, reason=at.reason or None)
        self.record.status(self.status)
        self.record.event(state, at.step, {"reason": at.reason} if at.reason else {})
        self.line.close()
        for line in closing(self.run_dir, data, at, saved):
            print(shown(line), flush=True)


def _committed(run_dir: Path, checkpoint: str) -> str:
    """Return when a checkpoint was committed: the manifest is written last. Now, where that cannot be read."""
    try:
        return timestamp((run_dir / "checkpoints" / checkpoint / "manifest.json").stat().st_mtime)
    except OSError:
        return timestamp()


def closing(run_dir: Path, data: Dataset, at: Progress, saved: int) -> Iterator[str]:
    """What a person wants to see at the end: before and after, answers side by side, where the result is."""
    if at.state != "done":
        kept = f"saved; this goes on from step {saved}:" if saved else "not saved; this begins again at step 1:"
        yield f"stopped at step {at.step} ({at.reason}); {kept}\n  {command_of(run_dir)}"
        return
    if at.evaluations:
        first, last = at.evaluations[0][1], at.evaluations[-1][1]
        last = next((found for step, found in at.evaluations if step == at.best_step), last)
        for key in [key for key in first.values if key in last.values]:
            yield f"{key:<14} {first.values[key]:.4f} before, {last.values[key]:.4f} after"
        assert data.eval is not None
        for before_answer, after_answer in list(zip(first.answers, last.answers, strict=False))[:5]:
            row = before_answer.row
            yield f"  right answer {data.eval.reference(row)!r}"
            yield f"    before {before_answer.text[:70]!r}  after {after_answer.text[:70]!r}"
    if saved and saved < at.step:
        yield f"not saved      step {at.step}: more steps would go on from the newest checkpoint, step {saved}"
    yield f"result         {run_dir / 'adapter'}"
