"""Where each point of a sweep stands: its folder held against what SLURM says of its job; no accounting is asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft_launchers import cluster, verdict
from dsft_launchers.codes import CRASHED, DIVERGED, DONE, STOPPED, USER_ERROR
from dsft_launchers.follow import GONE_S, UNDER_WAY, settled, tasks_of

from dsft import folder
from dsft.checkpoint import lease
from dsft.dispatch import job_of
from dsft.sweeps.ledger import Ledger

ALIVE = (*UNDER_WAY, "held", "ending")
"""States in which SLURM or this machine still works on a point."""
WRONG = ("failed", "diverged", "lost", "refused")
CODES = {
    "done": DONE,
    "refused": USER_ERROR,
    "stopped": STOPPED,
    "missing": STOPPED,
    "failed": CRASHED,
    "diverged": DIVERGED,
    "lost": CRASHED,
}
"""Exit code of a point that nobody followed to its end; of one that is alive, DONE."""


@dataclass(frozen=True)
class Standing:
    """One point. state: as in status.json, or held, ending, missing (never started), refused, lost (nothing lives)."""

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
        return DONE if self.state in ALIVE else CODES.get(self.state, CRASHED)


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
            where, now = f"job {job_id} on {job.nodes}", said if said in ("restarting", "stopping") else "running"
            return now, f"{where}: {reason}" if now == "restarting" else where
        return "held" if job.reason == cluster.HELD else "queued", f"job {job_id}: {job.reason}"
    if job is not None and not settled(job, disk) and -(job.left_s or 0.0) < GONE_S:
        return "ending", f"SLURM says {job.state} of job {job_id}"
    if said not in UNDER_WAY:
        return said, reason
    if job is not None:
        return "stopped" if job.state == "CANCELLED" else "failed", f"SLURM says {job.state} of job {job_id}"
    holder = lease.holder(run_dir) if said != "queued" else None
    if holder is not None and holder.alive:
        return said, holder.line
    return "lost", f"SLURM knows no job {job_id} any more" if job_id else "its process is gone"
