"""What SLURM says of itself, of its partitions and of a job, by its own commands."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

PATIENCE_S = 30.0
"""How long a command of SLURM's may take to answer."""
NO_TASK = 0xFFFFFFFE
"""The task of an array's own record once all that waited in it were cancelled."""
HELD = "JobHeldUser"
"""The reason of a job that its user keeps from starting."""
UNLIMITED = ("infinite", "UNLIMITED", "n/a")
FINAL = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)
"""States that a job does not leave, but for those that SLURM then requeues: they are PENDING seconds later."""


class ClusterError(RuntimeError):
    """A command of SLURM's failed; says which, and its own words."""


@dataclass(frozen=True)
class Partition:
    """nodes: how many it has; gres: generic resources of each kind of node, as SLURM writes them.

    memory_mib: of its smallest node; minutes: longest job, None without a limit.
    """

    name: str
    default: bool
    nodes: int
    gres: tuple[str, ...]
    memory_mib: int
    minutes: float | None


@dataclass(frozen=True)
class Job:
    """state: SLURM's word; reason: why it waits or ended; code: what the batch script exited with.

    excluded: nodes that it may not have; left_s: until its time limit, None without one; preempted: SLURM has begun to
    take its nodes away.
    """

    state: str
    reason: str
    code: int = 0
    restarts: int = 0
    nodes: str = ""
    num_nodes: int = 0
    excluded: str = ""
    left_s: float | None = None
    preempted: bool = False

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state in FINAL


def ask(*command: str, given: str = "", patience_s: float = PATIENCE_S) -> str:
    """What a command of SLURM's prints. given: what it reads. Raises ClusterError."""
    env = {**os.environ, "SLURM_BITSTR_LEN": "0"}  # else a long list of an array's tasks ends in dots
    try:
        done = subprocess.run(
            command, env=env, input=given, capture_output=True, text=True, check=False, timeout=patience_s
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ClusterError(said[-1] if said else f"{command[0]} ended with {done.returncode}")
    return done.stdout


def answers() -> bool:
    """Whether this machine can submit: sbatch is here and a controller answers."""
    if shutil.which("sbatch") is None:
        return False
    try:
        return "is UP" in ask("scontrol", "ping", patience_s=5.0)
    except ClusterError:
        return False


def partitions() -> list[Partition]:
    """All that this user may see."""
    found: dict[str, Partition] = {}
    for line in ask("sinfo", "--all", "--noheader", "--format=%R|%P|%D|%G|%m|%l").splitlines():
        name, starred, nodes, gres, memory, limit = line.strip().split("|")
        here = Partition(name, starred.endswith("*"), int(nodes), (gres,), int(memory.rstrip("+")), minutes(limit))
        if before := found.get(name):  # one line for each kind of node
            least = min(before.memory_mib, here.memory_mib)
            here = Partition(name, here.default, before.nodes + here.nodes, (*before.gres, gres), least, here.minutes)
        found[name] = here
    return list(found.values())


def minutes(text: str) -> float | None:
    """SLURM's time limits: 90 (minutes), 1:30:00, 2-12, 2-12:30:00; None for no limit. Raises ValueError."""
    if text in UNLIMITED:
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"a time limit reads like 90, 1:30:00 or 2-12:30:00, got {text}")
    days, *rest = (match[index] for index in range(1, 5))
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, mins, seconds = [*numbers, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + mins + seconds / 60
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1] + numbers[2] / 60
    return numbers[0] + (numbers[1] / 60 if len(numbers) == 2 else 0)


def job(job_id: str) -> Job | None:
    """A job or one task of an array (12_3), None once the controller has forgotten it (minutes after its end, at once
    if a task is cancelled before it began). Raises ClusterError.
    """
    lines = _shown(job_id)
    return _job(lines[0]) if lines else None


def tasks(array: str) -> dict[str, Job]:
    """Tasks of an array that the controller still knows, by their ids (12_3); a job that is none by its own id.

    Raises ClusterError.
    """
    found = {}
    for line in _shown(array):
        listed = re.search(r" ArrayTaskId=([\d,:-]+)", line)
        for job_id in [f"{array}_{number}" for number in numbers(listed[1])] if listed else [array]:
            found[job_id] = _job(line)
    found.pop(f"{array}_{NO_TASK}", None)
    return found


def numbers(text: str) -> list[int]:
    """The tasks of an array as SLURM lists them: 0-2,5,10-30:10 -> 0 1 2 5 10 20 30."""
    found: list[int] = []
    for first, last, step in re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", text):
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return found


def spell(tasks: Sequence[int]) -> str:
    """The opposite of numbers: 0 1 2 5 -> 0-2,5."""
    known = set(tasks)
    starts, ends = (sorted(number for number in known if number + step not in known) for step in (-1, 1))
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def held(folder: Path) -> list[str]:
    """This user's jobs and tasks that wait to be released and whose scripts lie in folder. Raises ClusterError."""
    command = ("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--states=PENDING", "--format=%i|%r|%o")
    jobs = [line.strip().split("|", 2) for line in ask(*command).splitlines()]
    return [
        job_id
        for job_id, reason, script in jobs
        if reason == HELD and Path(script).parent.resolve() == folder.resolve()
    ]


def max_array_size() -> int:
    """How many tasks an array may have; their numbers are below it. Raises ClusterError."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))
    return int(found[1]) if found else 1


def check_without(job_id: str, nodes: str) -> None:
    """Raise ClusterError, with SLURM's own words, if it could never start the job without these nodes."""
    script = ask("scontrol", "write", "batch_script", job_id, "-").splitlines(keepends=True)
    known = "".join(line for line in script if not line.startswith("#SBATCH --dependency"))  # on jobs now forgotten
    ask("sbatch", "--test-only", f"--exclude={nodes}", given=known)


def _shown(job_id: str) -> list[str]:
    """A line for the job, or for each record of the array."""
    try:
        return ask("scontrol", "--oneliner", "show", "job", job_id).splitlines()
    except ClusterError as error:
        if "Invalid job id" in str(error) or str(error).endswith("not found"):
            return []
        raise


def _job(line: str) -> Job:
    values = dict(re.findall(r"(\w+)=(\S*)", line))
    code, _, number = values.get("ExitCode", "0:0").partition(":")
    return Job(
        state=values["JobState"],
        reason=values.get("Reason", "None"),
        code=int(code) or (128 + int(number) if int(number) else 0),
        restarts=int(values.get("Restarts", "0")),
        nodes=values.get("NodeList", ""),
        num_nodes=int(values.get("NumNodes", "0").partition("-")[0]),
        excluded=values.get("ExcNodeList", "").removeprefix("(null)"),
        left_s=_seconds_until(values.get("EndTime", "Unknown")),
        preempted=_seconds_until(values.get("PreemptTime", "None")) is not None,
    )


def _seconds_until(moment: str) -> float | None:
    """From now to a time as SLURM writes it, in this machine's zone; None for Unknown, None or N/A."""
    try:
        return (datetime.fromisoformat(moment) - datetime.now()).total_seconds()
    except ValueError:
        return None
