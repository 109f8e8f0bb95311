"""Houlsby adapters: two bottlenecks per block, after attention and after the MLP; the norms learn too."""

from dataclasses import dataclass

from torch import nn

from dsft.methods.bottleneck import After, Bottleneck, device_of, put, train_norms
from dsft.methods.branches import branch_end, norms
from dsft.protocols import Anatomy


@dataclass(frozen=True, kw_only=True)
class Houlsby(Bottleneck):
    """y <- y + W_up phi(W_down y + b_down) + b_up on each branch's output y, before the residual stream takes it.

    Parameters: 2 L (2 m D + D + m) for L blocks of width D, and the norms' where train_norms is set. Cannot be merged.
    Differs from the paper in its start: W_up is 0 where the paper draws all from N(0, 0.01^2) cut at two deviations.
    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1 and figure 2.
    """

    train_norms: bool

    def add(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Two adapters in each block; with experts, the second is after the module around them."""
        for block in anatomy.blocks:
            for role in ("attention", "mlp"):
                module = model.get_submodule(branch_end(model, anatomy, block, role))
                put(self.adapter(model, device_of(module)), module, After)
        if self.train_norms:
            train_norms(model, norms(model, anatomy))
