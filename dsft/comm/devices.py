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

    host: what NCCL takes for one machine; unusable: why it can use none of those that are there, None if it can.
    """

    rank: int
    local_rank: int
    host: str
    visible: tuple[str, ...]
    unusable: str | None = None

    def __str__(self) -> str:
        """Return the name that the user reads."""
        return f"rank {self.rank} on {self.host}"


def seat(rank: int, local_rank: int, why_not: str | None = None) -> Seat:
    """This process's. Asks for the GPUs' UUIDs, which starts CUDA and takes no memory on any of them.

    why_not: it can use none of those that are there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible: tuple[str, ...] = ()
    try:
        visible = tuple(str(torch.cuda.get_device_properties(index).uuid) for index in range(count))
    except RuntimeError as error:  # one of them is broken
        why_not = f"its {count} GPUs must answer, got: {_first_line(error)}; look at nvidia-smi there"
    return Seat(rank, local_rank, os.environ.get("NCCL_HOSTID") or socket.gethostname(), visible, why_not)


def devices(seats: Sequence[Seat]) -> list[torch.device]:
    """The device of each rank, the same answer on all of them; the CPU for all where no rank sees a GPU.

    Ranks of a host that see the same GPUs take them in the order of their local ranks: a site may bind the ranks of one
    socket to its GPUs, and deal ranks to sockets in turn. Raises CannotBeginError, one line, if two ranks of a host
    would take the same GPU, only some see any, or one cannot use those that are there.
    """
    if lame := [mine for mine in seats if mine.unusable]:
        more = f" (and {len(lame) - 1} more)" if lame[1:] else ""
        raise CannotBeginError(f"{lame[0]}{more}: {lame[0].unusable}")
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


def take(device: torch.device) -> str | None:
    """Make a device this process's own, with a context on it; what CUDA says where it gives none, else None."""
    if device.type != "cuda":
        return None
    try:
        torch.cuda.set_device(device)
        torch.cuda.mem_get_info(device)  # set_device alone leaves the GPU that is current untouched
    except RuntimeError as error:
        return _first_line(error)
    return None


def _first_line(error: RuntimeError) -> str:
    """Return CUDA's message without torch's advice for debugging."""
    return str(error).partition("\n")[0]


def require_taken(seats: Sequence[Seat], taken: Sequence[torch.device], said: Sequence[str | None]) -> None:
    """Raise CannotBeginError, one line, for the first rank that got no context. said: what CUDA told each, or None."""
    for mine, device, why in zip(seats, taken, said, strict=True):
        if why is not None:
            raise CannotBeginError(
                f"{mine} cannot use GPU {mine.visible[device.index]}: {why}; nvidia-smi on {mine.host} shows who has "
                "it (all of its memory, or the GPU alone by its compute mode)"
            )


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Value, which is on the host, on device; the host does not wait for the copy.

    CUDA copies by itself from pinned memory alone, which torch does not use again before that is over.
    """
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
