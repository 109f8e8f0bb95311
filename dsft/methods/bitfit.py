"""BitFit: only biases learn, those of the model and, where linears have none, new ones that start at 0."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from dsft.methods.biases import add_bias, whole_with_biases
from dsft.methods.native import Native
from dsft.protocols import Anatomy


@dataclass(frozen=True, kw_only=True)
class BitFit(Native):
    """y = W x + b, b alone learns. Parameters: one per output of every linear, and the biases of norms.

    add_biases: give each linear of the blocks that has no bias one of zeros, packed linears too; fused experts and
    routers that are no nn.Linear get none. exclude: shell patterns of bias names that stay frozen, or are not added.
    Merges where the family can be built with these biases. Source: Ben Zaken et al. 2022, arXiv:2106.10199.
    """

    add_biases: bool
    exclude: tuple[str, ...]

    def add(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Add biases and free them. Raises ValueError if none would learn, or a pattern matches none."""
        names = [name for name, _ in model.named_parameters() if _is_bias(name)]
        missing = [f"{name}.bias" for name in anatomy.linears if model.get_submodule(name).bias is None]
        names += missing if self.add_biases else []
        for pattern in self.exclude:
            if not any(fnmatch(name, pattern) for name in names):
                like = names[0] if names else "none, as the model has none"
                raise ValueError(f"method.exclude must match biases, got {pattern}; their names are like {like}")
        chosen = [name for name in names if not any(fnmatch(name, pattern) for pattern in self.exclude)]
        if not chosen:
            raise ValueError(
                f"method=bitfit must find a bias to train, got none in {type(model).__name__}; "
                "set method.add_biases=true, or take patterns out of method.exclude"
            )
        for name in chosen:
            if name in missing:
                linear = model.get_submodule(name.removesuffix(".bias"))
                assert isinstance(linear, nn.Linear)
                add_bias(linear)
            model.get_parameter(name).requires_grad_(True)
            owner = model.get_submodule(name.rpartition(".")[0])
            if type(owner) is nn.LayerNorm:
                owner.__class__ = ShiftedNorm

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Zeros."""
        return torch.zeros(param.shape, dtype=torch.float32)

    def merge(self, model: nn.Module) -> nn.Module:
        """The model itself, where its family has a place for the biases."""
        merged: nn.Module = whole_with_biases(model)
        return merged


class ShiftedNorm(nn.LayerNorm):
    """A norm whose bias alone learns: kept in fp32, beside a scale that rests in the base's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """What both in the bias's dtype give; of the same shape as input."""
        return nn.functional.layer_norm(
            input, self.normalized_shape, self.weight.to(self.bias.dtype), self.bias, self.eps
        )


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2].endswith("bias")
