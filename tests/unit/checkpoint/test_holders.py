"""Which processes are of one start, and when a process of this machine began."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from dsft.checkpoint import holders
from dsft.checkpoint.lease import START, start_of

JOB = {"DSFT_SUPERVISED": "1", "SLURM_JOB_ID": "7", START: "typed"}
TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.mark.parametrize(("environ", "start"), [
    ({START: "typed"}, "typed"),
    (JOB, "slurm:7"),
    ({**JOB, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, "slurm:5_2"),
    (TASK, "slurm:7"),
    ({**TASK, "SLURM_STEP_NUM_TASKS": "1", START: "typed"}, "typed"),
    ({**TASK, "SLURM_STEP_ID": str(0xFFFFFFFB), START: "typed"}, "typed"),
    ({"SLURM_JOB_ID": "7", START: "typed"}, "typed"),
    ({"TORCHELASTIC_RUN_ID": "mine", START: "typed"}, "torchrun:mine"),
    ({"TORCHELASTIC_RUN_ID": "none", START: "typed"}, "torchrun:typed"),
], ids=str)  # fmt: skip
def test_what_one_start_is(environ: dict[str, str], start: str) -> None:
    assert start_of(environ) == start


def test_a_process_that_nobody_named_is_a_start_of_its_own() -> None:
    assert start_of({}).startswith(f"process:{os.getpid()}:")


def test_the_start_of_a_process_is_known_also_by_an_odd_name(tmp_path: Path) -> None:
    """Field 22 of /proc/PID/stat, whose second field may hold blanks and brackets."""
    program = tmp_path / "a) Z (b"
    program.symlink_to(shutil.which("sleep") or "")
    with subprocess.Popen([program, "60"]) as process:
        try:
            boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
            started = holders._started(process.pid)
            assert started is not None
            since = int(boot.split()[1]) + started / os.sysconf("SC_CLK_TCK")
            assert abs(time.time() - since) < 600, "the boot time is in whole seconds, and clocks are set"
        finally:
            process.kill()
    assert holders._started(process.pid) is None
