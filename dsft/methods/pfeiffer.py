"""Pfeiffer adapters: one bottleneck per block, after the MLP."""

from dataclasses import dataclass

from torch import nn

from dsft.methods.bottleneck import After, Bottleneck, device_of, put
from dsft.methods.branches import branch_end
from dsft.protocols import Anatomy


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Bottleneck):
    """y <- y + W_up phi(W_down y + b_down) + b_up on the MLP's output y, before the residual stream takes it.

    Parameters: L (2 m D + D + m) for L blocks of width D. Cannot be merged. The paper's blocks are post-norm: there the
    adapter reads norm(y + residual) and is followed by that norm again; a pre-norm decoder has no norm at that place.
    Source: Pfeiffer et al. 2021, AdapterFusion, arXiv:2005.00247; MAD-X, arXiv:2005.00052.
    """

    def add(self, model: nn.Module, anatomy: Anatomy) -> None:
        """One adapter in each block; with experts, after the module around them."""
        for block in anatomy.blocks:
            module = model.get_submodule(branch_end(model, anatomy, block, "mlp"))
            put(self.adapter(model, device_of(module)), module, After)
