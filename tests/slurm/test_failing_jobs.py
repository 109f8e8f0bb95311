"""Jobs whose ranks fail again and again, on one node, which is left out, or wherever they run; what they say of it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.faults import events
from benchmarks.testbed import Testbed
from tests.launch.processes import dsft
from tests.slurm.test_slurm import job_of, losses, state, status, until, words

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_node_that_ranks_twice_do_not_come_from_is_named_and_left_out(rows: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    more = ("launcher=slurm", "launcher.nodes=2", "launcher.devices=1", "strategy=ddp")
    done = subprocess.run(
        [sys.executable, "-m", "dsft.run", *words(rows, run_dir, *more)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    log = (run_dir / "slurm" / f"{job_of(run_dir)}.log").read_text()
    assert log.count("cannot begin: rank 1 (n2) did not answer within 4 s") == 2
    assert "ranks failed twice on n2, which is left out from now on" in log
    assert "ranks failed twice on n2, which is left out from now on" in done.stdout
    assert "n2" not in [rank["host"] for rank in events(run_dir, "start")[0]["ranks"]]
    assert state(job_of(run_dir), "ExcNodeList") == "n2"


ABSENT = """
import os, time

if os.environ.get("DSFT_SUPERVISED"):
    if os.environ["SLURMD_NODENAME"] == "n2":
        time.sleep(600)  # the planted fault: srun ends it once rank 0 has left
    from dsft.comm import meeting

    meeting.LIMIT_S, meeting.NOTICE_S = 4.0, 1.0
"""


def start(rows: Path, run_dir: Path, broken: str, *more: str) -> "subprocess.CompletedProcess[str]":
    """A run of two ranks on one node, with a loss that is broken by this line."""
    (run_dir.parent / "broken.py").write_text(BROKEN.replace("WHAT", broken))
    ranks = ("launcher=slurm", "launcher.nodes=1", "launcher.devices=2", "strategy=ddp", "checkpoint.every=0")
    return subprocess.run(
        [sys.executable, "-m", "dsft.run", *words(rows, run_dir, *ranks, "objective._target_=broken.Broken", *more)],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(run_dir.parent)},
    )  # fmt: skip


BROKEN = """
import os
from dataclasses import dataclass

from dsft.objectives.sft import SFT
from dsft_launchers.verdict import DivergedError, RefusedError

calls = []
rank = int(os.environ.get("RANK", "0"))


@dataclass(frozen=True, kw_only=True)
class Broken(SFT):
    def losses(self, model, batch):
        calls.append(batch)
        if len(calls) == 5:
            WHAT
        return super().losses(model, batch)
"""


def history(run_dir: Path, seconds: float = 240.0) -> list[tuple[str, str | None]]:
    """State and reason as they follow each other in status.json, until the run has ended."""
    seen: list[tuple[str, str | None]] = []
    end = time.monotonic() + seconds
    while not seen or seen[-1][0] not in ("done", "failed", "stopped"):
        assert time.monotonic() < end, seen
        now = status(run_dir)
        if not seen or seen[-1] != (now["state"], now["reason"]):
            seen.append((now["state"], now["reason"]))
        time.sleep(0.02)
    return seen


def test_a_run_that_always_crashes_stops_after_three_attempts_with_77(rows: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = start(rows, run_dir, "1 // 0")
    assert done.returncode == 77, done.stdout + done.stderr
    assert status(run_dir)["state"] == "failed"
    assert "ZeroDivisionError" in status(run_dir)["reason"]
    log = (run_dir / "slurm" / f"{job_of(run_dir)}.log").read_text()
    assert log.count("srun ended") == 3
    assert "giving up after 3 attempts" in log
    assert (
        state(job_of(run_dir), "Restarts") == "0"
    )  # an error that the program raised is not held against its one node
    assert (state(job_of(run_dir)), state(job_of(run_dir), "ExitCode")) == ("FAILED", "77:0")


def test_the_error_of_another_rank_than_0_is_the_reason_and_the_run_restarts_meanwhile(
    rows: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    error = "rank 1: ValueError: planted on rank one, timed out"
    raises = 'if rank == 1: raise ValueError("planted on rank one, timed out")'
    assert start(rows, run_dir, raises, "launcher.wait=false").returncode == 0
    seen = history(run_dir)
    assert seen[-1] == ("failed", f"3 attempts without a new checkpoint; {error}")
    assert [each for each in seen if each[0] == "restarting"] == [("restarting", error)] * 2
    assert [name for name, _ in seen[1:]] == ["running", "restarting"] * 2 + ["running", "failed"]
    until(lambda: state(job_of(run_dir)) == "FAILED")


@pytest.mark.parametrize(
    ("error", "code", "became"), [("RefusedError", 77, "failed"), ("DivergedError", 78, "diverged")]
)
def test_a_run_that_would_end_so_again_is_not_started_again(
    error: str, code: int, became: str, rows: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    line = "no checkpoint verifies; resume.anew=true begins anew"
    done = start(rows, run_dir, f'raise {error}("{line}")')
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == f"dsft: {line}\n"
    assert (status(run_dir)["state"], status(run_dir)["reason"]) == (became, line)
    assert (run_dir / "slurm" / f"{job_of(run_dir)}.log").read_text().count("srun ended") == 1


def test_a_run_whose_node_is_lost_is_queued_and_never_failed(cluster: Testbed, rows: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = ("launcher=slurm", "launcher.wait=false", "launcher.nodes=2", "launcher.devices=1", "strategy=ddp",
            "train.steps=100000", "train.compile=false")  # fmt: skip
    assert dsft(*words(rows, run_dir, *more)).returncode == 0
    until(lambda: (run_dir / "metrics.jsonl").is_file() and len(losses(run_dir)) >= 3)
    cluster("kill-node", "n2")
    seen = set[str]()

    def resumed() -> bool:
        seen.add(status(run_dir)["state"])
        return len(events(run_dir, "resume")) == 1

    until(resumed)
    subprocess.run(["scancel", job_of(run_dir)], check=True)
    cluster("start-node", "n2")
    assert state(job_of(run_dir), "Restarts") == "1"
    assert seen <= {"running", "restarting", "queued"}
    assert "queued" in seen
