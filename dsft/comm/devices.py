"""Which accelerator each rank takes, from what all ranks of its host may use; two never take the same."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from dsft_launchers.verdict import CannotBeginError
from torch import Tensor


@dataclass(frozen=True)
class Seat:
    """A rank's report before it has a device. visible: the UUIDs of the GPUs that it may use, in its own order.

    host: what NCCL takes for one machine.
    """

    rank: int
    local_rank: int
    host: str
    visible: tuple[str, ...]

    def __str__(self) -> str:
        """Return the name that the user reads."""
        return f"rank {self.rank} on {self.host}"


def seat(rank: int, local_rank: int) -> Seat:
    """This process's. Asks for the GPUs' UUIDs, which starts CUDA and takes no memory on any of them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = tuple(str(torch.cuda.get_device_properties(index).uuid) for index in range(count))
    return Seat(rank, local_rank, os.environ.get("NCCL_HOSTID") or socket.gethostname(), visible)


def devices(seats: Sequence[Seat]) -> list[torch.device]:
    """The device of each rank, the same answer on all of them; the CPU for all where no rank sees a GPU.

    Ranks of a host that see the same GPUs take them in the order of their local ranks: a site may bind the ranks of one
    socket to its GPUs, and deal ranks to sockets in turn. Raises CannotBeginError, one line, if two ranks of a host
    would take the same GPU, or only some see any.
    """
    without = [mine for mine in seats if not mine.visible]
    if len(without) == len(seats):
        return [torch.device("cpu")] * len(seats)
    if without:
        other = next(mine for mine in seats if mine.visible)
        raise CannotBeginError(
            f"{without[0]} sees no GPU, {other} sees {len(other.visible)}; all must be alike: look at nvidia-smi there"
        )
    found = []
    taken: dict[tuple[str, str], Seat] = {}
    for mine in seats:
        alike = [other for other in seats if other.host == mine.host and set(other.visible) == set(mine.visible)]
        alike.sort(key=lambda other: (other.local_rank, other.rank))
        gpu = alike[0].visible[alike.index(mine) % len(mine.visible)]  # in the first one's order, if theirs differ
        first = taken.setdefault((mine.host, gpu), mine)
        if first is not mine:
            raise CannotBeginError(
                f"rank {first.rank} and rank {mine.rank} on {mine.host} would both use GPU {gpu}; start as many ranks "
                "on a host as it has GPUs, and bind each to one of its own (srun --gpus-per-task=1) or to none"
            )
        found.append(torch.device("cuda", mine.visible.index(gpu)))
    return found


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Value, which is on the host, on device; the host does not wait for the copy.

    CUDA copies by itself from pinned memory alone, which torch does not use again before that is over.
    """
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
