"""QAT: full fine-tuning whose linears see their weights rounded; the result is a whole model of rounded weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dsft.methods.branches import grow
from dsft.methods.grid import STEM, Grid, Scheme, grid_of, held, load
from dsft.methods.rounded import Rounded, in_type
from dsft.protocols import Anatomy, Method


@dataclass(frozen=True, kw_only=True)
class Qat(Method):
    """Every parameter learns; y = x round(W)^T + b for the linears of the blocks, the gradient of round(W) is W's.

    round(W): per group of inputs (k - z) s, k of 2, 4 or 8 bits, s fp32, and z = 0 but with int2, found anew from W at
    each use so that none lies beyond the outer levels, where the gradient would be 0. With 8da4w x is rounded too, to 8
    bits per token. Parameters: all. The result holds round(W), which transformers loads as it is (8da4w: without the
    rounding of x), and in integers-NNNNN.safetensors for each weight called NAME: NAME.packed uint8
    (out, ceil(in bits / 8)), k + 2^(bits-1) with the first in the lowest bits, NAME.scales and NAME.zeros
    (out, in / group), fp32 and int8.
    dsft.methods.grid.load(model, folder) makes torchao's own quantized weights of them: to the bit the output of
    training, 8da4w's too.
    Source: Jacob et al. 2018, arXiv:1712.05877; LLM-QAT, Liu et al. 2023, arXiv:2305.17888; code: torchao's qat.
    """

    scheme: Scheme
    group_size: int | Literal["auto"]

    def __post_init__(self) -> None:
        """Refuse a grid that there is not."""
        grid_of(self.scheme, self.group_size)

    @property
    def grid(self) -> Grid:
        """What weights are rounded to."""
        return grid_of(self.scheme, self.group_size)

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Let everything learn; the linears of the blocks round."""
        for name in self.grid.linears(model, anatomy):
            linear = model.get_submodule(name)
            grow(linear, Rounded)
            linear.grid = self.grid  # type: ignore[assignment]  # what Rounded has
        return model.requires_grad_(True)

    def finished(
        self, model: nn.Module, anatomy: Anatomy, name: str, value: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Weights as the forward pass had them last, and their numbers and scales."""
        if name.endswith(".weight"):
            value = in_type(dtype, value)
        return held(self.grid, model, anatomy, name, value)

    @property
    def beside(self) -> tuple[str, Mapping[str, str]]:
        """Numbers and scales."""
        return STEM, self.grid.notes

    def restored(self, model: nn.Module, anatomy: Anatomy, folder: Path) -> nn.Module:
        """With 8da4w torchao's own linears, which round their input; else the weights are all there is to it."""
        return load(model, folder) if self.grid.inputs else model

    @property
    def whole(self) -> bool:
        """The result is a whole model."""
        return True

    @property
    def starts_as_base(self) -> bool:
        """False: the base's weights are rounded from the first step on."""
        return False
