"""Runs that are killed at random moments and started again until they are done: one must end as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dsft_launchers.local import launch

from benchmarks.run_folders import differences, events


@dataclass
class Verdict:
    """kills: (phase, rank, step); different: what is not bit-equal to the reference, empty if all is."""

    kills: list[tuple[str, int, int]] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)


def survive(
    reference: Path, run_dir: Path, command: Sequence[str], size: int, kills: int, dice: random.Random
) -> Verdict:
    """Start the run, kill a random rank, start it again, and so on; then let it end and compare with reference."""
    verdict = Verdict()
    start = [sys.executable, "-m", "dsft.run", *command, f"run_dir={run_dir}"]
    for _ in range(kills):
        with _started(start) as run:
            phase, rank = dice.choice(("step", "save")), dice.randrange(size)
            step = _moment(run, run_dir, phase, dice)
            if step is None:
                break  # it was done before the moment came
            os.kill(_ranks(run_dir)[rank], signal.SIGKILL)
            verdict.kills.append((phase, rank, step))
            run.wait(timeout=60)
        start = [sys.executable, "-m", "benchmarks.kills", str(run_dir), str(size)]
    done = subprocess.run(start, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        verdict.different.append(f"ended with {done.returncode}: {done.stderr[-2000:]}")
    verdict.resumed_from = [event["step"] for event in events(run_dir, "resume")]
    verdict.different += differences(reference, run_dir)
    return verdict


def _moment(run: "subprocess.Popen[bytes]", run_dir: Path, phase: str, dice: random.Random) -> int | None:
    """Wait for a random moment of this attempt, in a step or while a save is written; the step, None if it ended."""
    begun = starts(run_dir)
    after, wait = dice.randint(4, 9), dice.uniform(0, 0.06)
    seen: list[int] = []
    while run.poll() is None:
        if starts(run_dir) > begun or begun == 0:
            seen.append(steps_recorded(run_dir))
        unfinished = any((run_dir / "checkpoints").glob("step-*.tmp-*"))
        if seen and seen[-1] >= seen[0] + after and (phase == "step" or unfinished):
            time.sleep(wait)
            return seen[-1] if run.poll() is None else None
        time.sleep(0.002)
    return None


def starts(run_dir: Path) -> int:
    """Attempts that were ready to train; also while a line is being written."""
    path = run_dir / "events.jsonl"
    return path.read_text().count('"event": "assembled"') if path.is_file() else 0


def steps_recorded(run_dir: Path) -> int:
    """Steps in metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.is_file() else 0


def _ranks(run_dir: Path) -> list[int]:
    return [rank["pid"] for rank in events(run_dir, "start")[-1]["ranks"]]


@contextmanager
def _started(command: Sequence[str]) -> "Iterator[subprocess.Popen[bytes]]":
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield run
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait(timeout=120)


def main() -> int:
    """kills.py RUN SIZE: what dsft.run does once it has checked the run; spares a resume the checks' imports."""
    run = Path(sys.argv[1])
    job = [sys.executable, "-m", "dsft.job", str(run)]
    return launch(job, num_processes=int(sys.argv[2]), log_dir=run / "logs", env={})


if __name__ == "__main__":
    sys.exit(main())
