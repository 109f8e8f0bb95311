"""A submitted job, followed from the login node: its state and reason, and progress read from the run folder."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from dsft_launchers import cluster
from dsft_launchers.codes import CRASHED, DONE, HOPELESS, STOPPED, USER_ERROR

POLL_S = 2.0
GONE_S = 30.0
"""How long a job may look ended before it is: SLURM shows one that it puts back into the queue as ended for seconds."""
OWN = (DONE, USER_ERROR, STOPPED, CRASHED, HOPELESS)
"""What the batch step exits with by itself."""


def follow(job_id: str, run_dir: Path) -> int:
    """Wait until the job has ended for good; returns the run's exit code. Ctrl-C leaves the job alone."""
    said, over_since, status = "", None, dict[str, Any]()
    while True:
        try:
            job, status = cluster.job(job_id), _status(run_dir)
        except (cluster.ClusterError, OSError, ValueError) as error:  # a busy controller, a file system behind
            said = _say(f"waiting: {error}", said)
            time.sleep(POLL_S)
            continue
        said = _say(_line(job_id, job, status), said)
        if job is not None and not job.over:
            over_since = None
        elif _settled(job, status) or time.monotonic() - (over_since := over_since or time.monotonic()) > GONE_S:
            return _code(job, status)
        time.sleep(POLL_S)


def _settled(job: cluster.Job | None, status: dict[str, Any]) -> bool:
    """Whether a job that is over stays so: it said so itself, or someone cancelled it."""
    own = job is not None and job.state in ("COMPLETED", "FAILED") and job.code in OWN
    return own or status.get("state") == "done" or (job is not None and job.state == "CANCELLED")


def _line(job_id: str, job: cluster.Job | None, status: dict[str, Any]) -> str:
    if job is None:
        return f"job {job_id} is over"
    waits = f" ({job.reason})" if job.state == "PENDING" and job.reason != "None" else ""
    where = f" on {job.nodes}" if job.state == "RUNNING" else ""
    step = f", step {status['step']}" if status.get("step") else ""
    again = f", started again {job.restarts}x" if job.restarts else ""
    return f"job {job_id} {job.state}{waits}{where}{again}{step}"


def _code(job: cluster.Job | None, status: dict[str, Any]) -> int:
    """The run's exit code: its own where it gave one, else what became of it."""
    if status.get("state") == "done":
        return DONE
    if reason := status.get("reason"):
        print(f"dsft: {reason}", file=sys.stderr)
    if job is not None and job.state == "FAILED" and job.code in OWN:
        return job.code
    if status.get("state") == "stopped" or (job is not None and job.state == "CANCELLED"):
        return STOPPED
    print(f"dsft: SLURM says {job.state if job else 'nothing'} of the job; its log is in RUN/slurm", file=sys.stderr)
    return CRASHED


def _status(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "status.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def _say(line: str, before: str) -> str:
    if line != before:
        print(f"{time.strftime('%T')} {line}", flush=True)
    return line
