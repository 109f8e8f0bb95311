"""What SLURM says of itself, of its partitions and of a job, by its own commands."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from datetime import datetime

PATIENCE_S = 30.0
"""How long a command of SLURM's may take to answer."""
UNLIMITED = ("infinite", "UNLIMITED", "n/a")
FINAL = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)
"""States that a job does not leave, but for those that SLURM then requeues: they are PENDING seconds later."""


class ClusterError(RuntimeError):
    """A command of SLURM's failed; says which, and its own words."""


@dataclass(frozen=True)
class Partition:
    """nodes: how many it has; gpus, memory_mib: of its smallest node; minutes: longest job, None without a limit."""

    name: str
    default: bool
    nodes: int
    gpus: int
    memory_mib: int
    minutes: float | None


@dataclass(frozen=True)
class Job:
    """state: SLURM's word; reason: why it waits or ended; code: what the batch script exited with.

    left_s: until its time limit, None without one; preempted: SLURM has begun to take its nodes away.
    """

    state: str
    reason: str
    code: int = 0
    restarts: int = 0
    nodes: str = ""
    num_nodes: int = 0
    left_s: float | None = None
    preempted: bool = False

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state in FINAL


def ask(*command: str, patience_s: float = PATIENCE_S) -> str:
    """What a command of SLURM's prints. Raises ClusterError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patience_s)
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
        here = Partition(
            name, starred.endswith("*"), int(nodes), count_gpus(gres), int(memory.rstrip("+")), minutes(limit)
        )
        if before := found.get(name):  # one line for each kind of node
            gpus, least = min(before.gpus, here.gpus), min(before.memory_mib, here.memory_mib)
            here = Partition(name, here.default, before.nodes + here.nodes, gpus, least, here.minutes)
        found[name] = here
    return list(found.values())


def gpus_of(partition: str | None) -> int:
    """GPUs of each node of a partition, None for the default one; 0 where SLURM does not answer or has none."""
    try:
        return next(
            (each.gpus for each in partitions() if partition in (each.name, None) and (partition or each.default)), 0
        )
    except ClusterError:
        return 0


def count_gpus(gres: str) -> int:
    """GPUs in a list of generic resources: gpu:a100:4(S:0-1),tmp:1 -> 4."""
    return sum(int(match[1]) for match in re.finditer(r"\bgpu(?::[^:,(]+)?:(\d+)(?=[(,]|$)", gres))


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
    """A job, None once the controller has forgotten it (minutes after its end). Raises ClusterError."""
    try:
        text = ask("scontrol", "--oneliner", "show", "job", job_id)
    except ClusterError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    values = dict(re.findall(r"(\w+)=(\S*)", text))
    code, _, number = values.get("ExitCode", "0:0").partition(":")
    return Job(
        state=values["JobState"],
        reason=values.get("Reason", "None"),
        code=int(code) or (128 + int(number) if int(number) else 0),
        restarts=int(values.get("Restarts", "0")),
        nodes=values.get("NodeList", ""),
        num_nodes=int(values.get("NumNodes", "0").partition("-")[0]),
        left_s=_seconds_until(values.get("EndTime", "Unknown")),
        preempted=_seconds_until(values.get("PreemptTime", "None")) is not None,
    )


def _seconds_until(moment: str) -> float | None:
    """From now to a time as SLURM writes it, in this machine's zone; None for Unknown, None or N/A."""
    try:
        return (datetime.fromisoformat(moment) - datetime.now()).total_seconds()
    except ValueError:
        return None
