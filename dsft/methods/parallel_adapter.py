"""Parallel adapters: one scaled bottleneck per block, beside the MLP."""

from dataclasses import dataclass

from torch import nn

from dsft.methods.bottleneck import Beside, Bottleneck, device_of, put
from dsft.methods.branches import feed_forward
from dsft.protocols import Anatomy


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(Bottleneck):
    """y <- MLP(x) + s (W_up phi(W_down x + b_down) + b_up), x being what the MLP reads.

    Parameters: L (2 m D + D + m) for L blocks of width D. Cannot be merged.
    Source: He et al. 2022, arXiv:2110.04366, section 3.3 and table 2 (s = 4, W_up = 0).
    """

    scale: float

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"method.scale must be above 0, got {self.scale}")

    def add(self, model: nn.Module, anatomy: Anatomy) -> None:
        """One adapter in each block; experts have one together, beside the module around them."""
        for block in anatomy.blocks:
            module = model.get_submodule(feed_forward(model, anatomy, block))
            put(self.adapter(model, device_of(module), self.scale), module, Beside)
