"""Who is in this run: rank, size, device and the process group, as values that are passed."""

import os
import resource
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsft.comm.meeting import meet, within

T = TypeVar("T")

BACKEND = "cpu:gloo,cuda:nccl"
"""Where there are GPUs."""


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
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return [float(value) for value in largest.tolist()]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank; any picklable value."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


def join(timeout_s: float = 1800.0) -> World:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* name; alone without them.

    timeout_s: of a collective. Raises CannotBeginError if a rank is missing.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    # under srun --gpus-per-task=1 each task sees one accelerator, whatever its local rank
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # rank 0 has some sockets to each of the others
        store, backend = meet(rank, size), BACKEND if cuda else "gloo"
        with within("the ranks join"):
            dist.init_process_group(
                backend, timeout=timedelta(seconds=timeout_s), store=store, rank=rank, world_size=size
            )
    return World(rank=rank, size=size, local_rank=local_rank, device=device)


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
