"""Jobs whose ranks fail again and again: on one node, which is left out, or wherever they run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import events
from tests.slurm.test_slurm import job_of, state, status, words

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


def test_a_run_that_always_crashes_stops_after_three_attempts_with_77(rows: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "broken.py").write_text(BROKEN)
    more = (
        "launcher=slurm",
        "launcher.nodes=1",
        "launcher.devices=2",
        "strategy=ddp",
        "checkpoint.every=0",
        "objective._target_=broken.Broken",
    )
    done = subprocess.run(
        [sys.executable, "-m", "dsft.run", *words(rows, run_dir, *more)], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
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


BROKEN = """
from dataclasses import dataclass

from dsft.objectives.sft import SFT

calls = []


@dataclass(frozen=True, kw_only=True)
class Broken(SFT):
    def loss(self, model, batch):
        calls.append(batch)
        return super().loss(model, batch) if len(calls) < 5 else 1 // 0
"""
