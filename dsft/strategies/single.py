"""One process."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dsft.comm.world import World
from dsft.protocols import Anatomy, OptimizerFactory, Strategy
from dsft.strategies.update import Update, whole


@dataclass(kw_only=True)
class Single(Strategy):
    """Everything lives here."""

    update: Update = field(init=False, repr=False)

    def data_ranks(self, world: World) -> int:
        """One."""
        return 1

    def shard(self, model: nn.Module, anatomy: Anatomy, world: World, precision: str) -> nn.Module:
        """Nothing to lay out."""
        return model

    def prepare(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], make_optimizer: OptimizerFactory
    ) -> nn.Module:
        """Build the optimizer."""
        self.update = Update(groups, make_optimizer)
        return model

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, max_norm: float, lr_scale: float) -> float:
        """Move; see Update."""
        return self.update.step(max_norm, lr_scale)

    def drop(self) -> None:
        """Forget the gradients."""
        self.update.drop()

    def full(self, param: nn.Parameter) -> Tensor:
        """The parameter."""
        return whole(param)
