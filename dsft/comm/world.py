"""Who is in this run: rank, size, device and the process group, as values that are passed."""

import os
import re
import resource
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsft.comm import wire
from dsft.comm.devices import devices, require_taken, seat, sent, take
from dsft.comm.meeting import meet, within
from dsft.comm.segments import prefer_expandable
from dsft.comm.sight import unusable

T = TypeVar("T")

BACKEND = "cpu:gloo,cuda:nccl"
"""Where there are GPUs."""
GLOO = re.compile(r"\[\S*\bgloo/\S*:\d+\] ")
"""How an error of gloo begins that reads from a peer or writes to it; its own mistakes begin with [enforce fail."""
OWN_NCCL = re.compile(r"\bnccl(UnhandledCudaError|InvalidUsage|InvalidArgument)\b")
"""NCCL's words for what went wrong in this process, and not with a peer."""


@dataclass(frozen=True)
class World:
    """One process among all of them. rank in [0, size); local_rank counts within the node.

    group: what gather goes over; None is the default group of the processes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    def sum(self, value: Tensor) -> Tensor:
        """Sum of value over all ranks, on every rank; value is not changed."""
        if self.size == 1:
            return value
        total = value.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(value.device)

    def max(self, *values: float) -> list[float]:
        """Largest of each value over all ranks, in one message."""
        if self.size == 1:
            return list(values)
        largest = sent(torch.tensor(values, dtype=torch.float64), self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return [float(value) for value in largest.tolist()]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in rank order, on every rank.

        A value is data: None, a bool, a number, text, bytes, a path, a list, tuple, set or dict of such, or a dataclass
        or member of an enum of dsft's. It travels as JSON. Raises TypeError for anything else, as for an exception.
        """
        said = wire.spelled(value)
        return [wire.understood(content) for content in (self._texts(said) if self.size > 1 else [said])]

    def _texts(self, mine: bytes) -> list[bytes]:
        """Return every rank's bytes: first how many, then they themselves, as many for each as the longest has."""
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]), group=self.group)
        padded = bytearray(mine).ljust(int(torch.cat(lengths).max()), b" ")
        everyone = [torch.empty(len(padded), dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(everyone, torch.frombuffer(padded, dtype=torch.uint8), group=self.group)
        return [part.numpy().tobytes() for part in everyone]  # JSON ends before the blanks

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


def lost_peer(error: BaseException) -> bool:
    """Return True if error says that another rank left, or comes from one that does.

    By its type, or for gloo by the beginning of its message: what else times out or finds a broken pipe is the
    program's own error.
    """
    seen = set[int]()
    while id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, dist.DistError):
            return OWN_NCCL.search(str(error)) is None
        if type(error) is RuntimeError and GLOO.match(str(error)):
            return True
        error = error.__cause__ or error.__context__ or error
    return False


def join(timeout_s: float = 1800.0) -> World:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and the meeting place name; alone without them.

    timeout_s: of a collective. Raises CannotBeginError if a rank is missing, has no device of its own, or
    cannot use those that are there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    why_not = unusable(os.environ)
    prefer_expandable(os.environ)
    if size > 1 and not dist.is_initialized():
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # rank 0 has some sockets to each of the others
        store, backend = meet(rank, size), BACKEND if torch.cuda.is_available() else "gloo"
        with within("joining"):
            dist.init_process_group(
                backend, timeout=timedelta(seconds=timeout_s), store=store, rank=rank, world_size=size
            )
    world = World(rank=rank, size=size, local_rank=local_rank, device=torch.device("cpu"))
    with within("joining"):  # gather goes over the hosts' memory: no rank has touched a GPU yet
        seats = world.gather(seat(rank, local_rank, why_not))
        taken = devices(seats)
        require_taken(seats, taken, world.gather(take(taken[rank])))
    return replace(world, device=taken[rank])


def group_of_one() -> bool:
    """Give this process a group of its own if it has none, for what sums over a group; True if one was made."""
    if dist.is_initialized():
        return False
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(BACKEND if torch.cuda.is_available() else "gloo", store=store, rank=0, world_size=1)
    return True


def leave() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
