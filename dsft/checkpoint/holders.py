"""Processes that hold a run: which start each belongs to, whether it still lives, and what a lease file says of it."""

import os
import socket
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dsft_launchers.attempt import SUPERVISED
from dsft_launchers.join import SPECIAL_STEPS

START = "DSFT_START"
"""The environment variable with which dsft.run names its start to the processes that it starts."""
TORCHRUN = "torchrun:"
SILENT_S = 60.0
"""A holder on another host counts as gone once its lease file has not been touched for so long."""

Record = Mapping[str, Any]
"""The content of a lease file; empty if it cannot be read."""


def start_of(environ: Mapping[str, str]) -> str:
    """Return the name of the start that a process with environ belongs to; what a start holds is its processes'.

    All attempts of a SLURM job are one start, and so are those of a torchrun that was given an id.
    """
    job, task, array = (environ.get(f"SLURM_{name}") for name in ("JOB_ID", "ARRAY_TASK_ID", "ARRAY_JOB_ID"))
    if job and (SUPERVISED in environ or _is_srun_task(environ)):
        return f"slurm:{array}_{task}" if task and array else f"slurm:{job}"
    own = environ.get(START) or f"process:{os.getpid()}:{_started(os.getpid())}"
    name = environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return own
    return f"{TORCHRUN}{name}" if name not in ("", "none") else f"{TORCHRUN}{own}"


def record_of(environ: Mapping[str, str], *, claims: bool, after: str | None) -> Record:
    """Return what this process writes into its lease file.

    started, space: tell its pid from an equal one of another time or container. claims: it takes the run for a process
    that will write it; after: who wrote the run before.
    """
    who = {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname(), "space": _space()}
    return {**who, "time": time.time(), "start": start_of(environ), "claims": claims, "after": after}


def is_same(record: Record, environ: Mapping[str, str]) -> bool:
    """Return True if record names this process, or one of the same start as a process with environ."""
    start = str(record.get("start", ""))
    if start == start_of(environ):
        return True
    if start.startswith(TORCHRUN) and int(environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0:
        return True  # its agent has ended the ranks of before
    return record.get("pid") == os.getpid() and record.get("started") == _started(os.getpid()) and _is_here(record)


def lives(path: Path, record: Record) -> bool:
    """Return True if the process that wrote path still runs: on this host by /proc, elsewhere by its heartbeat."""
    if "released" in record or "pid" not in record:
        return False
    if not _is_here(record):
        return "start" in record and _silent_s(path) < SILENT_S  # one of an older dsft has no heartbeat
    started = _started(record["pid"])
    return started is not None and record.get("started", started) == started


def _is_here(record: Record) -> bool:
    """Return True if record's process is one of this host, and of this container if there are several."""
    return bool(record.get("host") == socket.gethostname()) and record.get("space", _space()) == _space()


def _space() -> str:
    """Return the name of the space in which this process' pid is unique on its host."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Return when a process of this host started, in ticks since the boot; None if it is gone or a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])


def _silent_s(path: Path) -> float:
    """Return the age of a file's last touch, by the clock of its file system."""
    try:
        touched = path.stat().st_mtime
    except OSError:
        return SILENT_S
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(b"now")
            probe.flush()
            return os.fstat(probe.fileno()).st_mtime - touched
    except OSError:  # a folder that may only be read
        return time.time() - touched


def _is_srun_task(environ: Mapping[str, str]) -> bool:
    """Return True for a task of an srun step of several tasks, as dsft_launchers.join sees it."""
    step, tasks = environ.get("SLURM_STEP_ID", ""), environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS")
    return "SLURM_PROCID" in environ and step.isdigit() and int(step) < SPECIAL_STEPS and int(tasks or 1) > 1


def line_of(record: Record) -> str:
    """Return which process a record names, and since when it holds the run."""
    if not {"pid", "host"} <= record.keys():
        return "another process"
    since = record.get("time")
    who = f"process {record['pid']} on {record['host']}"
    if not isinstance(since, int | float):
        return who
    return f"{who}, since {datetime.fromtimestamp(since, UTC).isoformat(timespec='seconds')}"
