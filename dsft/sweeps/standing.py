"""Where each point of a sweep stands: its folder held against what SLURM says of its job; no accounting is asked."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft_launchers import cluster, verdict
from dsft_launchers.codes import CRASHED, DONE, STOPPED, USER_ERROR
from dsft_launchers.follow import GONE_S, settled, tasks_of

from dsft import folder
from dsft.dispatch import job_of
from dsft.sweeps.ledger import Ledger
from dsft.telemetry.record import EVENTS, read_lines

ALIVE = ("queued", "held", "running", "ending")
"""States in which SLURM or this machine still works on a point."""
WRONG = ("failed", "lost", "refused")
CODES = {
    "done": DONE,
    "refused": USER_ERROR,
    "stopped": STOPPED,
    "missing": STOPPED,
    "failed": CRASHED,
    "lost": CRASHED,
}
"""Exit code of a point that nobody followed to its end; of one that is alive, DONE."""


@dataclass(frozen=True)
class Standing:
    """One point. state: as in status.json, or held, ending, missing (never started), refused, lost."""

    index: int
    run_dir: Path
    state: str
    step: int
    reason: str | None
    job: str | None

    @property
    def shown(self) -> str:
        """The state for a reader: in capitals where something went wrong."""
        return self.state.upper() if self.state in WRONG else self.state

    @property
    def why(self) -> str:
        """The reason in one line: of an error with its traceback, how it begins and what it was."""
        lines = (self.reason or "").splitlines() or [""]
        return lines[0] if len(lines) == 1 else f"{lines[0].split(';')[0]}; {lines[-1].removeprefix(verdict.CRASH)}"

    @property
    def code(self) -> int:
        """Its exit code."""
        return DONE if self.state in ALIVE else CODES[self.state]


def look(sweep: Path, book: Ledger) -> list[Standing]:
    """Where all points stand now. Raises ClusterError where SLURM has to be asked and does not answer."""
    disks = [folder.state(sweep / str(index)) for index in range(len(book.points))]
    jobs = [job_of(sweep / str(index)) for index in range(len(book.points))]
    tasks = tasks_of(job for job, disk in zip(jobs, disks, strict=True) if job and disk.get("state") != "done")
    found = []
    for index, (job, disk) in enumerate(zip(jobs, disks, strict=True)):
        run_dir, refused = sweep / str(index), book.points[index].refused
        state, reason = _state(disk, job, tasks.get(job or ""), run_dir)
        if refused is not None and state not in (*ALIVE, "done"):
            state, reason = "refused", refused
        found.append(Standing(index, run_dir, state, disk.get("step", 0), reason, job))
    return found


def _state(
    disk: Mapping[str, Any], job_id: str | None, job: cluster.Job | None, run_dir: Path
) -> tuple[str, str | None]:
    """State and reason of a point: SLURM's word where its job is alive, else the folder's, if that can be."""
    said, reason = disk.get("state", "missing"), disk.get("reason")
    if said == "done":
        return said, None
    if job is not None and not job.over:
        if job.state != "PENDING":
            return "running", f"job {job_id} on {job.nodes}"
        return "held" if job.reason == cluster.HELD else "queued", f"job {job_id}: {job.reason}"
    if job is not None and not settled(job, disk) and -(job.left_s or 0.0) < GONE_S:
        return "ending", f"SLURM says {job.state} of job {job_id}"
    if said not in ("queued", "running"):
        return said, reason
    if job is not None:
        return "stopped" if job.state == "CANCELLED" else "failed", f"SLURM says {job.state} of job {job_id}"
    if said == "running" and breathes(run_dir):
        return said, None
    return "lost", f"SLURM knows no job {job_id} any more" if job_id else "its process is gone"


def breathes(run_dir: Path) -> bool:
    """Whether rank 0 of a run's last start is a process of this machine."""
    starts = [line for line in read_lines(run_dir / EVENTS) if line["event"] == "start"]
    if not starts or starts[-1]["ranks"][0]["host"] != socket.gethostname():
        return False
    try:
        os.kill(starts[-1]["ranks"][0]["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
