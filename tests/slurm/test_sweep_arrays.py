"""Sweeps as real SLURM job arrays: throttled, gone on with after their launcher was killed, truthful of failures."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dsft_launchers.cluster import tasks

from benchmarks.faults import events
from tests.launch.processes import states, verb
from tests.slurm.test_slurm import job_of, losses, state, status, until, words

pytestmark = pytest.mark.usefixtures("cluster")

BROKEN = """
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dsft.objectives.sft import SFT

if "SLURM_JOB_ID" in os.environ and sys.argv[1].endswith("/5"):
    while not Path(__file__).with_name("go").is_file():
        time.sleep(0.1)
    raise ZeroDivisionError("made to fail")


@dataclass(frozen=True, kw_only=True)
class Broken(SFT):
    pass
"""


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def spawn() -> Iterator[Start]:
    """Start a module's command in the background; it is gone at the end."""
    spawned: list[subprocess.Popen[str]] = []

    def spawn(*words: str | Path) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", *map(str, words)]
        spawned.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return spawned[-1]

    yield spawn
    for process in spawned:
        with process:  # closes what is still open, and waits
            process.kill()


@pytest.fixture
def start(spawn: Start, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start a sweep."""
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return partial(spawn, "dsft.run", "-m", *words(rows, tmp_path / "sweep", "launcher=slurm", "checkpoint.every=0"))


def heard(process: Any, text: str) -> str:
    """What a process says, up to the line with the text."""
    said = ""
    while text not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    return said


def at_once(points: Sequence[Path]) -> int:
    """The most points that were between their start and their end."""
    spans = [[events(point, name)[0]["time"] for name in ("start", "done")] for point in points]
    return max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)


def test_a_killed_launcher_leaves_an_array_and_resume_starts_only_what_is_missing(
    start: Start, spawn: Start, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    launcher = start(
        "train.steps=2", "launcher.max_parallel=3", "method.rank=4,8,16", "optim.lr=1e-4,2e-4,5e-4,1e-3",
        "objective._target_=broken.Broken",
    )  # fmt: skip
    heard(launcher, "submitted    12 points as job array")
    launcher.kill()
    launcher.communicate()
    jobs = [job_of(sweep / str(index)) for index in range(12)]
    array = jobs[0].partition("_")[0]
    assert jobs == [f"{array}_{index}" for index in range(12)]
    assert state(jobs[11], "ArrayTaskThrottle") == "3"
    subprocess.run(["scancel", jobs[11]], check=True)
    assert states(sweep)[11] == "LOST"
    resume = spawn("dsft.sweep", "resume", sweep)
    said = heard(resume, " points to submit")
    (tmp_path / "go").touch()  # not before: resume starts what has failed, too
    said += resume.communicate()[0]
    assert resume.returncode == 77, said
    again = [job_of(sweep / str(index)) for index in range(12)]
    assert again[:11] == jobs[:11]
    assert again[11] != jobs[11]
    good = [sweep / str(index) for index in range(12) if index != 5]
    assert [status(point)["state"] for point in good] == ["done"] * 11
    assert [len(events(point, "start")) for point in good] == [1] * 11
    assert 1 < at_once(good) <= 3
    assert (state(jobs[5]), status(sweep / "5")["state"]) == ("FAILED", "failed")
    table = said[said.rindex("point  state") :].splitlines()
    assert table[-1].split()[:2] == ["5", "FAILED"]
    assert "ZeroDivisionError: made to fail" in table[-1]
    shown = [float(line.split()[3]) for line in table[1:-1]]
    assert shown == pytest.approx(sorted(losses(point)[-1] for point in good), abs=1e-4)  # four decimals


def test_a_submission_killed_half_way_runs_nothing_until_resume_does_and_nothing_twice(
    start: Start, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    launcher = start("optim.lr=1e-4,2e-4,3e-4,4e-4,5e-4,6e-4", "+launcher.extra.begin=now+1hour", "launcher.wait=false")
    until(lambda: (sweep / "0" / "slurm" / "job.json").is_file() or launcher.poll() is not None)
    launcher.kill()
    launcher.communicate()
    array = job_of(sweep / "0").partition("_")[0]
    recorded = [index for index in range(6) if (sweep / str(index) / "slurm" / "job.json").is_file()]
    assert len(recorded) < 6
    assert {task.reason for task in tasks(array).values()} == {"JobHeldUser"}
    done = verb("resume", sweep)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [job_of(sweep / str(index)) for index in range(6)]
    assert [index for index in range(6) if jobs[index] == f"{array}_{index}"] == recorded
    alive = [name for job in {array, jobs[5].partition("_")[0]} for name, task in tasks(job).items() if not task.over]
    assert sorted(alive) == sorted(jobs)
    assert states(sweep) == ["queued"] * 6
    assert verb("resume", sweep).returncode == 0
    assert [job_of(sweep / str(index)) for index in range(6)] == jobs
    assert verb("cancel", sweep).returncode == 0
    assert states(sweep) == ["stopped"] * 6


def test_a_task_goes_back_into_the_queue_without_the_others(start: Start, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    more = ("train.steps=100000", "train.compile=false", "checkpoint.every=1000", "launcher.wait=false")
    launcher = start(*more, "optim.lr=1e-3,2e-3")
    assert launcher.communicate()[0]
    assert launcher.returncode == 0
    until(lambda: all((sweep / index / "metrics.jsonl").is_file() and len(losses(sweep / index)) > 2 for index in "01"))
    last = job_of(sweep / "1")
    assert state(last, "JobId") == last.partition("_")[0], "its plain id is the array's"
    subprocess.run(["scancel", "--signal=USR2", last], check=True)
    until(lambda: len(events(sweep / "1", "resume")) == 1)
    assert [state(job_of(sweep / index), "Restarts") for index in "01"] == ["0", "1"]
    assert states(sweep) == ["running"] * 2
    assert verb("cancel", sweep).returncode == 0
    until(lambda: states(sweep) == ["stopped"] * 2)
