"""Loudness: one learned number per linear scales what it gives. The toy that the tests hold the contracts to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsft.methods.branches import grow
from dsft.methods.native import Native
from dsft.protocols import ROLES, Anatomy


@dataclass(frozen=True, kw_only=True)
class Loudness(Native):
    """y <- (1 + g) y for the output y of every linear of the blocks whose role is in roles; g (1,), from 0, learns.

    Parameters: one a linear. Merges into W' = (1 + g) W, b' = (1 + g) b.
    """

    roles: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse roles that there are not."""
        if not self.roles or not set(self.roles) <= set(ROLES):
            raise ValueError(f"method.roles must be of {', '.join(ROLES)}, got {list(self.roles)}; name one or more")

    def add(self, model: nn.Module, anatomy: Anatomy) -> None:
        for name, role in anatomy.linears.items():
            if role in self.roles:
                linear: Any = model.get_submodule(name)
                linear.loudness = nn.Parameter(torch.zeros(1, device=next(linear.parameters()).device))
                grow(linear, Loud)

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        return torch.zeros(param.shape)

    def merge(self, model: nn.Module) -> nn.Module:
        for linear in [module for module in model.modules() if isinstance(module, Loud)]:
            linear.fold()
        return model


class Loud(nn.Module):
    """A linear whose output (..., out) is scaled. plain: its class before."""

    plain: type[nn.Module]
    loudness: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[misc]
        return (y * (1 + self.loudness.float())).to(y.dtype)

    @torch.no_grad()
    def fold(self) -> None:
        """Put the number into weight and bias, and be a plain linear again."""
        scale = 1 + self.loudness
        del self.loudness
        for param in self.parameters(recurse=False):
            param.mul_(scale)
        self.__class__ = self.plain  # type: ignore[assignment]
