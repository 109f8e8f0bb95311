"""Whether what a run keeps on each GPU fits into what other programs leave of it, before anything is loaded."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dsft_launchers.join import ON_CPUS, VISIBLE
from dsft_launchers.verdict import CannotBeginError

from dsft.comm.world import World

SURE = ("weights", "values", "moments")
"""Parts of the plan that lie on the device from the first step to the last."""
GIB = 2**30


@dataclass(frozen=True)
class Room:
    """Bytes of the GPU that a rank has taken: free now, and in all. gpu: its number on the host and its name."""

    rank: int
    host: str
    gpu: str
    free: int
    total: int


def require_room(world: World, plan: Mapping[str, Any], *, wanted: str, paged: bool) -> None:
    """Raise CannotBeginError on every rank if a GPU has not free what a rank keeps there by plan. Collective.

    wanted: launcher.gpus, which may ask for GPUs that no rank has; paged: the moments may be in host memory.
    """
    host = socket.gethostname()
    if world.device.type != "cuda":
        if wanted not in ("auto", ON_CPUS):
            raise CannotBeginError(
                f"launcher.gpus={wanted} asks for a GPU for each process, and rank {world.rank} on {host} sees none; "
                f"look at {VISIBLE} and nvidia-smi there, or take launcher.gpus=none to train on the CPU"
            )
        return
    free, total = torch.cuda.mem_get_info(world.device)
    name = f"GPU {world.device.index} ({torch.cuda.get_device_name(world.device)})"
    check_room(world.gather(Room(world.rank, host, name, free, total)), kept(plan["memory"], paged=paged))


def kept(memory: Mapping[str, int | None], *, paged: bool) -> int:
    """Bytes that a rank keeps on its device at least. memory: of the plan; paged: its moments may lie elsewhere."""
    return sum(memory[part] or 0 for part in SURE if not (paged and part == "moments"))


def check_room(rooms: Sequence[Room], needed: int) -> None:
    """Raise CannotBeginError, one line, for the first of rooms that has less than needed bytes free."""
    for room in rooms:
        if room.free >= needed:
            continue
        here = f"rank {room.rank} on {room.host}: {room.gpu} must have {needed / GIB:.1f} GiB free for weights, "
        here += f"trained values and moments, got {room.free / GIB:.1f} of {room.total / GIB:.1f} GiB"
        if room.total < needed:
            raise CannotBeginError(f"{here}; take more or larger GPUs (python -m dsft.plan says what a run needs)")
        raise CannotBeginError(
            f"{here}: other programs have the rest; nvidia-smi on {room.host} lists them: end them, or hide this GPU "
            "(CUDA_VISIBLE_DEVICES)"
        )
