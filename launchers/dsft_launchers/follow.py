"""Submitted jobs, followed from the login node: their states and reasons, and progress read from the run folders."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsft_launchers import cluster
from dsft_launchers.codes import CRASHED, DIVERGED, DONE, HOPELESS, STOPPED, USER_ERROR
from dsft_launchers.shown import in_a_line, say

POLL_S = 2.0
POINTS_PER_S = 50.0
"""Points of a sweep that a controller is asked for."""
GONE_S = 30.0
"""How long a job may look ended before it is."""
UNDER_WAY = ("queued", "running", "restarting", "stopping")
"""States of a run that has not come to an end, in status.json."""
OWN = (DONE, USER_ERROR, STOPPED, CRASHED, HOPELESS, DIVERGED)
"""What the batch step exits with by itself."""


def follow(job_id: str, run_dir: Path) -> int:
    """Wait until the job has ended for good; returns the run's exit code. Ctrl-C leaves the job alone."""
    said, ending, status = "", Ending(), dict[str, Any]()
    while True:
        try:
            job, status = cluster.job(job_id), _status(run_dir)
        except (cluster.ClusterError, OSError, ValueError) as error:  # a busy controller, a file system behind
            said = _say(f"waiting: {error}", said)
            time.sleep(POLL_S)
            continue
        said = _say(_line(job_id, job, status), said)
        if ending.reached(job, status):
            return _code(job, status, "")
        time.sleep(POLL_S)


def follow_points(points: Mapping[int, tuple[str, Path]]) -> dict[int, int]:
    """Wait until all points of a sweep have ended for good; their exit codes. points: (task, run folder) of each."""
    endings = {index: Ending() for index in points}
    codes, told, said = dict[int, int](), dict[int, str](), ""
    while len(codes) < len(points):
        left = {index: each for index, each in points.items() if index not in codes}
        try:
            jobs = tasks_of(job_id for job_id, _ in left.values())
            statuses = {index: _status(run_dir) for index, (_, run_dir) in left.items()}
        except (cluster.ClusterError, OSError, ValueError) as error:
            said = _say(f"waiting: {error}", said)
            time.sleep(POLL_S)
            continue
        for index, (job_id, _) in left.items():
            job, status = jobs.get(job_id), statuses[index]
            if endings[index].reached(job, status):
                codes[index] = _code(job, status, f"point {index}: ")
                _say(f"point {index}: {status.get('state')}, exit code {codes[index]}", "")
            elif job is not None and (job.state == "RUNNING" or index in told):
                told[index] = _say(f"point {index}: {_line(job_id, job, {})}", told.get(index, ""))
        said = _say(waits, said) if (waits := _all_wait(left, jobs)) else said
        time.sleep(max(POLL_S, len(left) / POINTS_PER_S) if len(codes) < len(points) else 0.0)
    return codes


def _all_wait(points: Mapping[int, tuple[str, Path]], jobs: Mapping[str, cluster.Job]) -> str | None:
    """That no point does anything but wait, and for what; None if one does."""
    here = [jobs[job_id] for job_id, _ in points.values() if job_id in jobs]
    reasons = Counter(job.reason for job in here if job.state == "PENDING")
    if sum(reasons.values()) < len(points):
        return None
    why = ", ".join(f"{count} for {reason}" for reason, count in sorted(reasons.items()) if reason != "None")
    return f"{len(points)} points wait{': ' if why else ''}{why}"


def tasks_of(job_ids: Iterable[str]) -> dict[str, cluster.Job]:
    """What SLURM knows of all tasks of the arrays that these belong to. Raises ClusterError."""
    found = dict[str, cluster.Job]()
    for array in sorted({job_id.partition("_")[0] for job_id in job_ids}):
        found |= cluster.tasks(array)
    return found


class Ending:
    """Whether a job has ended for good; SLURM shows one that it puts back into the queue as ended for seconds."""

    def __init__(self) -> None:
        self.since: float | None = None

    def reached(self, job: cluster.Job | None, status: Mapping[str, Any]) -> bool:
        """True once it has, by what is seen now."""
        if job is not None and not job.over:
            self.since = None
            return False
        self.since = self.since or time.monotonic()
        return settled(job, status) or time.monotonic() - self.since > GONE_S


def settled(job: cluster.Job | None, status: Mapping[str, Any]) -> bool:
    """Whether a job that is over stays so: it said so itself, or someone cancelled it."""
    if job is None:
        return status.get("state") not in UNDER_WAY
    own = job.state in ("COMPLETED", "FAILED") and job.code in OWN
    return own or status.get("state") == "done" or job.state == "CANCELLED"


def _line(job_id: str, job: cluster.Job | None, status: Mapping[str, Any]) -> str:
    if job is None:
        return f"job {job_id} is over"
    waits = f" ({job.reason})" if job.state == "PENDING" and job.reason != "None" else ""
    where = f" on {job.nodes}" if job.state == "RUNNING" else ""
    step = f", step {status['step']}" if status.get("step") else ""
    again = f", started again {job.restarts}x" if job.restarts else ""
    _, put_back, reason = (status.get("reason") or "").partition(f"SLURM job {job_id}: ")
    why = f": {reason}" if put_back else ""
    if job.state == "RUNNING" and status.get("state") == "restarting":
        why = f", restarting: {status.get('reason')}"
    return f"job {job_id} {job.state}{waits}{where}{again}{step}{why}"


def _code(job: cluster.Job | None, status: Mapping[str, Any], who: str) -> int:
    """The run's exit code: its own where it gave one, else what became of it, and its error on stderr."""
    if status.get("state") == "done":
        return DONE
    if reason := status.get("reason"):
        say(f"dsft: {who}{reason}")
    if job is not None and job.state == "FAILED" and job.code in OWN:
        return job.code
    if status.get("state") == "stopped" or (job is not None and job.state == "CANCELLED"):
        return STOPPED
    said = job.state if job else "nothing"
    say(f"dsft: {who}SLURM says {said} of the job; its log is in RUN/slurm or SWEEP/slurm")
    return CRASHED


def _status(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "status.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def _say(line: str, before: str) -> str:
    if line != before:
        print(in_a_line(f"{time.strftime('%T')} {line}"), flush=True)
    return line
