"""Data parallel: every rank holds the whole model; gradients of what learns are summed in flat buckets."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dsft.comm.world import World, group_of_one
from dsft.protocols import Anatomy
from dsft.strategies.update import OnTensors
from dsft.strategy import Shares


@dataclass(kw_only=True)
class DDP(OnTensors):
    """The sum runs over buckets that never change, so that a resumed run adds in the same order as an unbroken one.

    (torch's DistributedDataParallel rebuilds its buckets after the first step.)
    """

    bucket_mib: int

    def __post_init__(self) -> None:
        """Refuse buckets that hold nothing."""
        if self.bucket_mib < 1:
            raise ValueError(f"strategy.bucket_mib must be 1 or more, got {self.bucket_mib}")

    def data_ranks(self, world: World) -> int:
        """All of them."""
        return world.size

    def shares(self, size: int) -> Shares:
        """All; the buckets hold what learns once more while it is summed."""
        return Shares(weights=1, values=1, gradients=2, moments=1, shown=1)

    def shard(self, model: nn.Module, anatomy: Anatomy, world: World, precision: str) -> nn.Module:
        """Nothing to lay out: each rank reads the same values."""
        group_of_one()
        return model

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate; after the last micro-batch, sum over the ranks."""
        loss.backward()  # type: ignore[no-untyped-call]
        if last:
            self._sum_gradients()

    def _sum_gradients(self) -> None:
        """All buckets at once, then wait; a parameter that this rank did not use counts as zero."""
        for param in self.update.params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        in_flight = []
        for bucket in self._buckets():
            flat = _flatten_dense_tensors(bucket)
            in_flight.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in in_flight:
            work.wait()  # type: ignore[union-attr]
            for grad, summed in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                grad.copy_(summed)

    def _buckets(self) -> list[list[Tensor]]:
        limit = self.bucket_mib * 2**20
        buckets: list[list[Tensor]] = []
        size = limit
        for param in self.update.params:
            grad = param.grad
            assert grad is not None
            if size + grad.nbytes > limit or buckets[-1][0].dtype != grad.dtype:
                buckets.append([])
                size = 0
            buckets[-1].append(grad)
            size += grad.nbytes
        return buckets
