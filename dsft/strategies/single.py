"""One process."""

from dataclasses import dataclass

from torch import Tensor, nn

from dsft.comm.world import World
from dsft.protocols import Anatomy
from dsft.strategies.update import OnTensors
from dsft.strategy import Shares


@dataclass(kw_only=True)
class Single(OnTensors):
    """Everything lives here."""

    def data_ranks(self, world: World) -> int:
        """One."""
        return 1

    def shares(self, size: int) -> Shares:
        """All."""
        return Shares(weights=1, values=1, gradients=1, moments=1, shown=1)

    def shard(self, model: nn.Module, anatomy: Anatomy, world: World, precision: str) -> nn.Module:
        """Nothing to lay out."""
        return model

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate."""
        loss.backward()  # type: ignore[no-untyped-call]
