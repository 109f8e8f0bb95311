"""GPUs of this machine and of SLURM's nodes: what launcher.gpus means, how sbatch is asked, what is refused."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from dsft_launchers import cluster
from dsft_launchers.join import ON_CPUS, VISIBLE, count_devices

UNTYPED = ("auto", "any")
"""Values of launcher.gpus that name no kind."""


def of_run(
    wanted: str,
    kind: str,
    partition: str | None,
    devices: int | Literal["auto"],
    env: Mapping[str, str],
    *,
    elsewhere: bool,
) -> int:
    """GPUs of each node that a run may have. wanted: launcher.gpus; kind: of its start; elsewhere: it is planned.

    Raises ValueError where this machine has not what is wanted.
    """
    if wanted == ON_CPUS:
        return 0
    if kind == "slurm":
        asked = 0 if wanted == "auto" else 1 if devices == "auto" else devices
        return of_partition(partition, wanted) or asked  # what is asked for by name is there, or sbatch will tell
    if wanted not in UNTYPED:
        raise ValueError(
            f"launcher.gpus={wanted} is a kind that SLURM is asked for, and this run is no SLURM job ({kind}); take any"
        )
    here = count_devices(env)
    if wanted == "any" and not here and not elsewhere:
        why = f"{VISIBLE}={env[VISIBLE]!a} hides them" if VISIBLE in env else "there is no /dev/nvidia0"
        raise ValueError(f"launcher.gpus=any needs a GPU of this machine, got none: {why}; take none for its CPU")
    return here


def of_partition(partition: str | None, wanted: str = "auto") -> int:
    """GPUs of each node of a partition, or of several with commas between; None: of the default one.

    wanted: auto, those that each node has, 0 if one has none; any, or a kind: of the nodes that have such. 0 where
    SLURM does not answer.
    """
    try:
        known = cluster.partitions()
    except cluster.ClusterError:
        return 0
    names = partition.split(",") if partition else [each.name for each in known if each.default]
    return fewest([gres for each in known if each.name in names for gres in each.gres], wanted)


def fewest(gres: Sequence[str], wanted: str) -> int:
    """GPUs of the node that has fewest, from each node's generic resources. wanted: as of_partition has it."""
    counts = [count(each, None if wanted in ("auto", "any") else wanted) for each in gres]
    return min(counts if wanted == "auto" else filter(None, counts), default=0)


def count(gres: str, kind: str | None = None) -> int:
    """GPUs in a list of generic resources, of this kind or of any: gpu:a100:4(S:0-1),tmp:1 -> 4."""
    found = re.finditer(r"\bgpu(?::([^:,(]+))?:(\d+)(?=[(,]|$)", gres)
    return sum(int(match[2]) for match in found if kind in (match[1], None))


def kinds(gres: str) -> list[str]:
    """gpu:a100:4(S:0-1),gpu:h100:2 -> a100 h100."""
    return re.findall(r"\bgpu:([^:,(]+):\d+(?=[(,]|$)", gres)


def asks_for_gpus(option: str, value: object) -> bool:
    """Whether this option of sbatch, and its value, ask for GPUs."""
    return option.startswith("gpus") or (option in ("gres", "tres-per-task") and "gpu" in str(value))


def options(each_node: int, kind: str | None, *, bound: bool) -> dict[str, str]:
    """The option of sbatch that gives a node's tasks all of its GPUs, or (bound) each of them one alone; none for 0.

    The steps of the job take it over: srun reads SLURM_GPUS_PER_TASK and binds.
    """
    if not each_node:
        return {}
    prefix = f"{kind}:" if kind else ""
    return {"gpus-per-task": f"{prefix}1"} if bound else {"gpus-per-node": f"{prefix}{each_node}"}


def check(asked: int, kind: str | None, names: str, gres: Sequence[str]) -> None:
    """Raise ValueError for more GPUs than the largest node has, or of another kind. gres: the nodes' resources.

    names: of the partitions.
    """
    most = max((count(each, kind) for each in gres), default=0)
    if kind is not None and not most:
        known = ", ".join(["auto", "none", "any", *sorted({found for each in gres for found in kinds(each)})])
        raise ValueError(f"launcher.gpus must be one of {known} in partition {names}, got {kind}")
    if not most:
        raise ValueError(f"launcher.partition must have GPUs for launcher.gpus=any, got {names}; take another, or auto")
    if asked > most:
        raise ValueError(
            f"launcher.devices must be at most {most}, the GPUs of a node of partition {names}, got {asked}; lower "
            "it, or take launcher.gpus=none for processes on CPUs"
        )
