"""Where this process stands: started by torchrun, a task of an srun step, or alone; and its rank variables."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from dsft_launchers import cluster
from dsft_launchers.place import MEETING

TORCHRUN_PORT = "29500"
"""torchrun's own default."""
SLURM_PORTS = range(20000, 26000)
"""Below Linux' default ephemeral range."""
SPECIAL_STEPS = 0xFFFFFFF0
"""Step ids from here on are no srun step: the batch script (0xfffffffb), the interactive step (0xfffffffa), ..."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""What hides GPUs from CUDA: empty, it hides all of them."""
ON_CPUS = "none"
"""launcher.gpus of a run that computes on CPUs."""
GPU = re.compile(r"\d+|(GPU|MIG)-\S+")
"""What names a GPU there."""

ANYWHERE = "on any machine python -m dsft.plan shows the plan, and launcher.dry_run=true prints the batch script"
"""What can be had of a job where it cannot be submitted."""

Kind = Literal["torchrun", "slurm task", "slurm", "local"]


@dataclass(frozen=True)
class Start:
    """How this run gets its processes. variables: RANK, WORLD_SIZE, ... of this process; empty where it has no rank."""

    kind: Kind
    why: str
    variables: dict[str, str]


def resolve(
    name: str,
    env: Mapping[str, str],
    *,
    devices: int | Literal["auto"],
    nodes: int,
    dry_run: bool = False,
    planning: bool = False,
) -> Start:
    """Tell what launcher=name means in the environment env; raise ValueError where it cannot work.

    auto joins torchrun or an srun step if this process was started by one, else it is a SLURM job where a controller
    answers and this machine has no accelerator, else it is local. An sbatch script or an salloc shell is not a task of
    a step: there, auto is local. dry_run: a job that is printed; planning: nothing is started, and what needs SLURM
    is a job also where none answers.
    """
    start = _rank_of_ours(env) or _torchrun(env) or _slurm_task(env)
    if start is not None and name != "auto":
        raise ValueError(
            f"launcher must be auto where others start the processes, got {name}; {start.why}: leave "
            f"launcher={name} out"
        )
    if start is not None:
        _agree(start, devices, nodes)
        return start
    if name == "slurm" or (name == "auto" and dry_run):
        return _job("a batch script that is printed" if dry_run else "a job that is planned" if planning else None)
    if name == "auto" and "SLURM_JOB_ID" not in env and not count_devices(env) and cluster.answers():
        return Start("slurm", "a SLURM controller answers and this machine has no GPU", {})
    if nodes != 1 and name == "auto" and planning:
        return _job(f"a job of {nodes} nodes that is planned")
    if nodes != 1:
        raise ValueError(
            f"launcher.nodes must be 1 for processes of this machine, got {nodes}; for more, take launcher=slurm "
            "where there is SLURM, or start the same command with torchrun on every node and leave launcher=auto; "
            f"{ANYWHERE}"
        )
    inside = (
        f"in SLURM job {env['SLURM_JOB_ID']}, but no task of a many-task srun step" if "SLURM_JOB_ID" in env else ""
    )
    return Start(
        "local", f"{inside or 'not started by torchrun or srun'}: the processes are started on this machine", {}
    )


def _job(unsent: str | None) -> Start:
    """A job of SLURM. unsent: what it is instead where nothing is submitted, so that no SLURM is needed."""
    if unsent is None and not cluster.answers():
        raise ValueError(
            "launcher=slurm needs sbatch and a SLURM controller that answers, and this machine has not; run it on a "
            f"login node, or take launcher=local; {ANYWHERE}"
        )
    return Start("slurm", unsent or "a job of this machine's SLURM", {})


def count_devices(env: Mapping[str, str]) -> int:
    """Number of NVIDIA GPUs that a process with env would see; 0 without any.

    CUDA looks no further than the first name of CUDA_VISIBLE_DEVICES that is none, as -1 or SLURM's NoDevFiles.
    """
    visible = env.get(VISIBLE)
    if visible is None:
        return sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    return len(list(takewhile(GPU.fullmatch, (name.strip() for name in visible.split(",")))))


def promised_devices(env: Mapping[str, str]) -> int:
    """GPUs that a process with env is to compute on: those of count_devices, or of the SLURM job that has some."""
    given = env.get("SLURM_GPUS_ON_NODE", "") if VISIBLE not in env else ""
    return count_devices(env) or (int(given) if given.isdigit() else 0)


def expand_hosts(hostlist: str) -> list[str]:
    """Hosts of a SLURM host list: n[1-3,07],m1 -> n1 n2 n3 n07 m1."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hostlist):
        hosts += _expand(part)
    return hosts


def _expand(part: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", part)
    if match is None:
        return [part]
    head, tails = part[: match.start()], _expand(part[match.end() :])
    return [f"{head}{number}{tail}" for number in _numbers(match.group(1)) for tail in tails]


def _numbers(ranges: str) -> list[str]:
    numbers: list[str] = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def _rank_of_ours(env: Mapping[str, str]) -> Start | None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", MEETING)
    if not all(env.get(name) for name in names):
        return None
    variables = {name: env[name] for name in names}
    return Start("torchrun", f"a rank of the local launcher: rank {env['RANK']} of {env['WORLD_SIZE']}", variables)


def _torchrun(env: Mapping[str, str]) -> Start | None:
    if not all(env.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
        return None
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_WORLD_SIZE")
    variables = {name: env[name] for name in names if name in env}
    variables["LOCAL_RANK"] = env.get("LOCAL_RANK", "0")
    variables["MASTER_PORT"] = env.get("MASTER_PORT", TORCHRUN_PORT)
    return Start("torchrun", _sentence("RANK and WORLD_SIZE are set, as by torchrun", variables), variables)


def _slurm_task(env: Mapping[str, str]) -> Start | None:
    step = env.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= SPECIAL_STEPS or "SLURM_PROCID" not in env:
        return None
    size = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if int(size) < 2:
        return None
    hosts = expand_hosts(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    spread = int(env["SLURM_JOB_ID"]) * 31 + int(step)  # steps of one job, and jobs on one node, do not meet
    variables = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(_tasks_on_node(env)),
        "MASTER_ADDR": env.get("MASTER_ADDR") or hosts[0],
        "MASTER_PORT": env.get("MASTER_PORT") or str(SLURM_PORTS[spread % len(SLURM_PORTS)]),
    }
    return Start("slurm task", _sentence(f"a task of srun step {env['SLURM_JOB_ID']}.{step}", variables), variables)


def node_of(rank: int, env: Mapping[str, str]) -> str | None:
    """The node of a rank of this srun step; None elsewhere, and where its ranks are laid out in an odd order."""
    order = env.get("SLURM_DISTRIBUTION", "block").partition(":")[0]
    tasks = (env.get("SLURM_PROCID"), env.get("SLURM_STEP_NUM_TASKS"))
    if "SLURM_STEP_NODELIST" not in env or tasks != (env.get("RANK"), env.get("WORLD_SIZE")):
        return None  # its ranks are no tasks of the step: torchrun's, or a launcher's inside it
    if order not in ("block", "cyclic"):
        return None
    counts = zip(expand_hosts(env["SLURM_STEP_NODELIST"]), _tasks_per_node(env), strict=True)
    places = [(turn, host) for host, count in counts for turn in range(count)]
    if order == "cyclic":
        places.sort(key=lambda place: place[0])
    return places[rank][1]


def _tasks_on_node(env: Mapping[str, str]) -> int:
    return _tasks_per_node(env)[int(env.get("SLURM_NODEID", "0"))]


def _tasks_per_node(env: Mapping[str, str]) -> list[int]:
    """The entries of a list like 2(x3),1."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _agree(start: Start, devices: int | Literal["auto"], nodes: int) -> None:
    """Refuse counts that contradict the processes that exist."""
    if devices == "auto":
        return
    here, size = start.variables.get("LOCAL_WORLD_SIZE", str(devices)), start.variables["WORLD_SIZE"]
    if int(here) != devices or (nodes > 1 and int(size) != devices * nodes):
        raise ValueError(
            f"launcher.devices and launcher.nodes must match the processes that were started ({here} per node, {size} "
            f"in all), got {devices} and {nodes}; leave them out: launcher=auto takes what is there"
        )


def _sentence(reason: str, variables: Mapping[str, str]) -> str:
    place = f"{variables['MASTER_ADDR']}:{variables['MASTER_PORT']}"
    return f"{reason}: rank {variables['RANK']} of {variables['WORLD_SIZE']}, meeting at {place}"
