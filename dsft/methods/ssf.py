"""SSF: each output of a linear or a norm is scaled and shifted, feature by feature; only that learns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dsft.methods.biases import add_bias, whole_with_biases
from dsft.methods.branches import grow, norms
from dsft.methods.native import Native
from dsft.packed import packed_weights
from dsft.protocols import Anatomy


@dataclass(frozen=True, kw_only=True)
class SSF(Native):
    """y <- gamma * y + beta for the output y (..., d) of every linear of the blocks and every norm, the final one too.

    Parameters: 2 d for each; fused experts, and routers that are no nn.Linear, get none. Stored as gamma - 1
    (ssf_scale) and beta (ssf_shift), so that weight decay pulls to the base and rounding next to 1 loses no step.
    start: identity (gamma 1, beta 0), or paper (N(1, 0.02^2) and N(0, 0.02^2), which is not the base).
    norms: false leaves norms alone. Merges into W' = gamma W, b' = gamma b + beta where the family can be built with a
    bias on every linear, and where every norm that is scaled has one.
    Source: Lian et al. 2022, arXiv:2210.08823, equations 2 and 4.
    """

    start: Literal["identity", "paper"]
    norms: bool

    def __post_init__(self) -> None:
        """Refuse a start that there is not."""
        if self.start not in ("identity", "paper"):
            raise ValueError(f"method.start must be identity or paper, got {self.start}")

    def add(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Scale and shift what linears and norms give."""
        for name in (*anatomy.linears, *(norms(model, anatomy) if self.norms else ())):
            module = model.get_submodule(name)
            size: int = module.out_features if isinstance(module, nn.Linear) else len(cast(Tensor, module.weight))
            device = next(module.parameters()).device
            for part in ("ssf_scale", "ssf_shift"):
                setattr(module, part, nn.Parameter(torch.zeros(size, device=device)))
            grow(module, Scaled)

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Zeros, or the paper's start."""
        value = torch.zeros(param.shape, dtype=torch.float32)
        return value if self.start == "identity" else nn.init.normal_(value, std=0.02)

    def merge(self, model: nn.Module) -> nn.Module:
        """Fold scale and shift into weights and biases, which must not be packed."""
        scaled = [(name, module) for name, module in model.named_modules() if isinstance(module, Scaled)]
        for name, module in scaled:
            if not _takes(module):
                raise ValueError(
                    f"--to merged must have a place for every shift, got {name}, a norm without a bias; take "
                    "--to adapter, or train with method.norms=false"
                )
        with torch.no_grad():
            for _, module in scaled:
                _fold(module)
        merged: nn.Module = whole_with_biases(model)
        return merged


class Scaled(nn.Module):
    """A module whose output (..., d) is scaled and shifted. plain: its class before."""

    plain: type[nn.Module]
    ssf_scale: nn.Parameter
    ssf_shift: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's own, in its type; the sum is made in fp32."""
        y: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        return (y * (1 + self.ssf_scale.float()) + self.ssf_shift.float()).to(y.dtype)


def _takes(module: Scaled) -> bool:
    """True if gamma and beta can go into the module: a linear, or torch's own LayerNorm with a bias."""
    if issubclass(module.plain, nn.Linear):
        return not packed_weights(module)
    return module.plain is nn.LayerNorm and module.bias is not None


def _fold(module: Any) -> None:
    """Put gamma and beta into weight and bias, and take them off the module."""
    gamma, beta = 1 + module.ssf_scale, module.ssf_shift
    del module.ssf_scale, module.ssf_shift
    module.__class__ = module.plain
    if module.bias is None:
        add_bias(module)
    module.weight.mul_(gamma[:, None] if module.weight.ndim == 2 else gamma)
    module.bias.mul_(gamma).add_(beta)
