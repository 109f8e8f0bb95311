"""A run as a SLURM job: what is asked of sbatch through submitit, checked first against what the cluster has."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft_launchers import cluster, gpus

LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlayfs", "devtmpfs")
"""What lies in one machine's memory or image: other nodes see another one."""
KEPT_S = 30
"""Least time between the start of a job and the notice of its end, which SLURM may give up to a minute early."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""What could end a line of a batch script, or hide it."""
OPTION = re.compile(r"[a-z][a-z0-9-]*")
"""The name of an option of sbatch."""
IMPOSSIBLE = "Requested node configuration is not available"
SHADOWS = {
    "partition": "PARTITION", "account": "ACCOUNT", "qos": "QOS", "time": "TIMELIMIT", "constraint": "CONSTRAINT",
    "exclude": "EXCLUDE", "reservation": "RESERVATION", "memory": "MEM_PER_NODE", "gpus": "GPUS_PER_NODE",
    "bound": "GPUS_PER_TASK",
}  # fmt: skip
"""Key of a request -> SBATCH_... variable, which would win over what the script says."""
WISHES = ("partition", "account", "qos", "time", "memory", "cpus", "constraint", "exclude", "reservation")
"""Keys of launcher=slurm that go to sbatch by names of their own."""
OURS = ("ARRAY_INX", "SIGNAL", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "NO_KILL")
"""SBATCH_... variables that would take from a job what its supervisor or its sweep relies on."""
ANOTHERS = "SLURM_GPUS_PER_TASK"
"""What a job has for itself from which this one is submitted: the srun of this one would bind GPUs by it."""


@dataclass(frozen=True)
class Request:
    """One job, or an array of them. None: as the cluster has it. time: SLURM's notation.

    gpus: of each node, 0 for none; kind: of them, as SLURM names it, None for any; bound: each task sees one alone;
    notice_s: from the signal to the time limit; elastic: a lost node does not end the job; array: the tasks' numbers
    as sbatch lists them, None for a single job; after: jobs that must have ended before.
    """

    name: str
    nodes: int
    devices: int
    gpus: int
    partition: str | None
    account: str | None
    qos: str | None
    time: str | None
    memory: str | None
    cpus: int | None
    constraint: str | None
    exclude: str | None
    reservation: str | None
    extra: Mapping[str, str | int | bool]
    setup: Sequence[str]
    notice_s: int
    elastic: bool
    array: str | None = None
    after: tuple[str, ...] = ()
    kind: str | None = None
    bound: bool = False


def check(request: Request, run_dir: Path) -> None:
    """Raise ValueError for what this cluster would refuse, or leave waiting for ever."""
    if odd := sorted(set(":%") & set(str(run_dir))):
        raise ValueError(f"run_dir must be without {' and '.join(odd)} for SLURM, got {run_dir}; choose another")
    limit = None if request.time is None else cluster.minutes(request.time)
    if limit is not None and limit * 60 < request.notice_s + KEPT_S:
        raise ValueError(
            f"launcher.time must leave {KEPT_S} s beside launcher.notice_s={request.notice_s}, the time to save, got "
            f"{request.time}; raise it or lower launcher.notice_s"
        )
    try:
        _check_partition(request, limit)
        _check_account(request.account)
        _check_possible(request, run_dir)
    except cluster.ClusterError as error:
        raise ValueError(f"launcher=slurm needs SLURM's answer, and it says: {error}; try again later") from error
    kind = _file_system(run_dir)
    if kind in LOCAL_FILE_SYSTEMS:
        raise ValueError(
            f"run_dir must lie where every node sees it, got {run_dir} on a {kind} of this machine; choose a shared "
            "folder"
        )


def _check_partition(request: Request, limit: float | None) -> None:
    """Nodes and time against the largest of the partitions that are named, or the default one."""
    known = {each.name: each for each in cluster.partitions()}
    names = request.partition.split(",") if request.partition else [n for n, each in known.items() if each.default]
    if absent := [name for name in names if name not in known]:
        raise ValueError(f"launcher.partition must be one of {', '.join(known)}, got {absent[0]}")
    if not names:  # the site chooses by other means: sbatch will tell
        return
    nodes = max(known[name].nodes for name in names)
    if request.nodes > nodes:
        raise ValueError(
            f"launcher.nodes must be at most {nodes}, the nodes of partition {','.join(names)}, got {request.nodes}"
        )
    if request.gpus:
        gres = [each for name in names for each in known[name].gres]
        gpus.check(request.gpus, request.kind, ",".join(names), gres)
    limits = [known[name].minutes for name in names]
    longest = None if None in limits else max(filter(None, limits), default=None)
    if limit is not None and longest is not None and limit > longest:
        raise ValueError(
            f"launcher.time must be at most {longest:g} minutes, the limit of partition {','.join(names)}, got "
            f"{request.time}"
        )


def _check_possible(request: Request, run_dir: Path) -> None:
    """Ask SLURM, which would let a job wait for ever whose nodes do not exist."""
    try:
        cluster.ask("sbatch", "--test-only", given=script(request, ["true"], run_dir / "slurm"))
    except cluster.ClusterError as error:
        if IMPOSSIBLE in str(error):  # whatever else it says of a script, it says when that is submitted
            raise ValueError(f"SLURM could never start this job: it has no such nodes{_wishes(request)}") from error


def _check_account(account: str | None) -> None:
    if account is None or shutil.which("sacctmgr") is None:
        return
    try:
        known = cluster.ask("sacctmgr", "--noheader", "--parsable2", "list", "account", "format=Account").split()
    except cluster.ClusterError:  # no accounting here: sbatch will tell
        return
    if known and account not in known:
        raise ValueError(f"launcher.account must be one of {', '.join(known)}, got {account}")


def _file_system(path: Path) -> str:
    """Kind of file system that path, or its nearest folder that exists, lies on."""
    while not path.exists():
        path = path.parent
    done = subprocess.run(["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def refuse_controls(asked: Mapping[str, object]) -> None:
    """Raise ValueError for a value, or an option of launcher.extra, that would be more than itself in a batch script.

    asked: key -> value, lists and mappings too. submitit quotes values for one line, and options not at all.
    """
    for key, value in asked.items():
        if isinstance(value, Mapping):
            odd = [str(option) for option in value if not OPTION.fullmatch(str(option))]
            if odd:
                raise ValueError(
                    f"{key} must name options of sbatch, as in {key}.mail-type=END, got {odd[0]!a}; write small "
                    "letters, digits and - alone"
                )
            refuse_controls({f"{key}.{option}": each for option, each in value.items()})
            continue
        for each in value if isinstance(value, list | tuple) else [value]:
            if CONTROL.search(str(each)):
                way = (
                    "each line is an item of its own"
                    if isinstance(value, list | tuple)
                    else "in YAML > ends it so, >- does not"
                )
                raise ValueError(
                    f"{key} must be without line breaks and other control characters, got {str(each)!a}; {way}"
                )


def script(request: Request, command: Sequence[str], folder: Path) -> str:
    """The batch script: command runs once, on the first node, as the batch step itself. Needs no SLURM.

    Raises ValueError for what would be more than itself in it.
    """
    refuse_controls({
        "run_dir": folder, "the folder in which you type it": os.getcwd(), "launcher.prefix": command,
        **{f"launcher.{key}": getattr(request, key) for key in (*WISHES, "extra", "setup")},
    })  # fmt: skip
    return str(_executor(request, folder)._make_submission_file_text(_line(command), ""))


def submit(request: Request, command: Sequence[str], folder: Path) -> str:
    """Hand the job to SLURM, held until `scontrol release`; returns its id. folder: for the script and its output.

    Raises ValueError in SLURM's own words, and leaves nothing then.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    script(request, command, folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*OURS, *(name for key, name in SHADOWS.items() if getattr(request, key))):
        os.environ.pop(f"SBATCH_{name}", None)
    os.environ.pop(ANOTHERS, None)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit shows what it raises
            return str(_executor(request, folder)._submit_command(_line(command)).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        for leftover in folder.glob(".submission_file_*"):
            leftover.unlink()
        for path in made:
            path.rmdir()
        said = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Try ")]
        raise ValueError(f"SLURM refused the job: {_plain(said[-1])}{_wishes(request)}") from error


def _plain(said: str) -> str:
    return said.removeprefix("sbatch: ").removeprefix("error: ")


def _wishes(request: Request) -> str:
    """The end of a sentence: what was asked of SLURM by name, which may be what it does not like."""
    asked = [f"launcher.{key}={value}" for key in WISHES if (value := getattr(request, key)) is not None]
    asked += [f"launcher.extra.{key}={value}" for key, value in request.extra.items()]
    return f"; asked for {', '.join(asked)}" if asked else ""


def _line(command: Sequence[str]) -> str:
    """The script's last command: what takes its place gets the signals that SLURM sends to the batch step."""
    return f"exec {shlex.join(command)}"


def _executor(request: Request, folder: Path) -> Any:
    from submitit import SlurmExecutor

    class Writer(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # a script can be written where no srun is

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            for empty in self.folder.glob(f".submission_file_{uid}.sh"):
                empty.chmod(0o700)  # launcher.setup may hold what is nobody else's
            return str(super()._make_submission_file_text(command, uid))

    executor = Writer(folder=folder)
    asked = {
        "job_name": request.name, "nodes": request.nodes, "ntasks_per_node": request.devices,
        "partition": request.partition, "account": request.account, "qos": request.qos,
        "cpus_per_task": request.cpus, "constraint": request.constraint, "exclude": request.exclude,
        "setup": list(request.setup) or None,
    }  # fmt: skip
    more = {
        "time": request.time, "mem": request.memory, "reservation": request.reservation, "requeue": True,
        "no-kill": request.elastic, "hold": True, "signal": f"USR2@{request.notice_s}", "open-mode": "append",
        "output": str(folder / ("%A_%a.log" if request.array else "%j.log")), "array": request.array,
        **gpus.options(request.gpus, request.kind, bound=request.bound),
        **request.extra,
    }  # fmt: skip
    if request.after:
        own = [str(request.extra["dependency"])] if "dependency" in request.extra else []
        more["dependency"] = ",".join([f"afterany:{':'.join(request.after)}", *own])
    executor.update_parameters(
        **{key: value for key, value in asked.items() if value is not None},
        additional_parameters={key: value for key, value in more.items() if value not in (None, False)},
        stderr_to_stdout=True,
        use_srun=False,
    )
    executor.parameters["wckey"] = None  # submitit's own, which clusters that know wckeys refuse
    if request.time is None:  # submitit's own is 5 minutes
        executor.parameters["time"] = None
    return executor


def job_name(run_dir: Path) -> str:
    """A job's name from its run folder."""
    return re.sub(r"[^\w.-]", "-", f"dsft-{run_dir.name}")
