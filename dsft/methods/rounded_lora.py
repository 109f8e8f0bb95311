"""LoRA under rounding: the sum of base and product is what is rounded, under PEFT's own layer."""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from dsft.methods.grid import Grid
from dsft.methods.rounded import in_type, product


class RoundedLora(Linear):
    """PEFT's Linear with one plain adapter: y = x round(W + s B A)^T + b. grid: how it is rounded.

    Dropout takes no part in the rounding: in training s B A (dropped x - x) is added, so that the gradients of the
    factors are those of LoRA with dropout.
    """

    grid: Grid

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X (..., in) -> (..., out)."""
        base: nn.Linear = self.base_layer  # type: ignore[assignment]
        if self.disable_adapters or self.merged:
            return product(x, base.bias, self.grid, in_type, base.weight)
        (name,) = self.active_adapters
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        scale = self.scaling[name]
        y = product(x, base.bias, self.grid, partial(summed, scale), base.weight, down.weight, up.weight)
        if self.training and isinstance(self.lora_dropout[name], nn.Dropout):
            y = y + (up(down(self.lora_dropout[name](x) - x)) * scale).to(y.dtype)
        return y


def summed(scale: float, dtype: torch.dtype, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """W + s B A in fp32, (out, in), of factors as a product in dtype sees them; the order of PEFT's own merge."""
    return weight.to(dtype).float() + up.to(dtype).float() @ down.to(dtype).float() * scale


def factors_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Round the factors of PEFT's layers in model to dtype, as summed does, for PEFT to merge."""
    for module in model.modules():
        if isinstance(module, Linear):
            for factor in (*module.lora_A.values(), *module.lora_B.values()):
                factor.weight.data = factor.weight.to(dtype).float()
