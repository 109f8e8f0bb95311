"""Runs as real processes, and what they left in their folders."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import faults
from tests import warm


def dsft(*words: str) -> "subprocess.CompletedProcess[str]":
    return warm.run("dsft.run", *words)


def verb(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Python -m dsft.sweep."""
    return warm.run("dsft.sweep", *words)


def states(sweep: Path) -> list[str]:
    """The second column of `dsft.sweep status`, by point."""
    return [line.split()[1] for line in verb("status", sweep).stdout.splitlines()[:-1]]


@contextmanager
def started(*words: str) -> "Iterator[subprocess.Popen[str]]":
    """A run in the background; it is gone at the end."""
    command = [sys.executable, "-m", "dsft.run", *words]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield run
    finally:
        if run.poll() is None:
            run.send_signal(signal.SIGCONT)
            run.kill()
            run.wait()


def wait_for(condition: Callable[[], Any], run: "subprocess.Popen[str]", seconds: float = 240.0) -> Any:
    """What condition gives once it is true. Fails if the run ends before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        assert run.poll() is None, run.stdout.read() if run.stdout else ""
        time.sleep(0.005)
    raise AssertionError("it did not come to pass")


def steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in faults.lines(run_dir / "metrics.jsonl") if "loss" in line]


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-????????"))
