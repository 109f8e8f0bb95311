"""Toy programs as the ranks of the local launcher: no torch, a launcher process per test."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LAUNCHERS = Path(__file__).parents[2] / "launchers"

DRIVER = """
import json, sys
from pathlib import Path
from dsft_launchers.local import run_ranks

script, num_processes, log_dir, grace_s = sys.argv[1:]
command = [sys.executable, "-c", Path(script).read_text()]
ending = run_ranks(command, num_processes=int(num_processes), log_dir=Path(log_dir), env={}, grace_s=float(grace_s))
Path(log_dir).with_name("reason.json").write_text(json.dumps(ending.reason))
sys.exit(ending.code)
"""

PRELUDE = """
import os, pathlib, signal, subprocess, sys, time
rank = int(os.environ["RANK"])
here = pathlib.Path(os.environ["TEST_FOLDER"])
def ready():
    (here / f"pid-{rank}.tmp").write_text(str(os.getpid()))
    (here / f"pid-{rank}.tmp").rename(here / f"pid-{rank}")
"""

Launch = Callable[..., subprocess.Popen[str]]


def launches(folder: Path) -> Iterator[Launch]:
    """What the fixture `launch` of a test file gives: starts a launcher, and ends what is left of it."""
    started: list[subprocess.Popen[str]] = []

    def start(body: str, *, num_processes: int = 2, grace_s: float = 10.0, **env: str) -> subprocess.Popen[str]:
        script = folder / f"rank-{len(started)}.py"
        script.write_text(PRELUDE + body)
        clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "DSFT_LAUNCH")}
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(script), str(num_processes), str(folder / "logs"), str(grace_s)],
            env={**clean, "PYTHONPATH": str(LAUNCHERS), "TEST_FOLDER": str(folder), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str], timeout_s: float = 60.0) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def reason(folder: Path) -> str | None:
    """The cause that the launcher found."""
    found: str | None = json.loads((folder / "reason.json").read_text())
    return found


def pid_of(folder: Path, name: str, timeout_s: float = 60.0) -> int:
    until = time.monotonic() + timeout_s
    path = folder / f"pid-{name}"
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)
    return int(path.read_text())


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_gone(pids: list[int], timeout_s: float = 5.0) -> list[int]:
    until = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.02)
    return left
