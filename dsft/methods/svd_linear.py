"""The forward pass of PEFT's AdaLoRA layer without a sum in place, and without a parameter for a number."""

from collections.abc import Iterator
from typing import Any

from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor, nn

from dsft.methods.peft_bridge import ADAPTER


class PlainSVDLinear(SVDLinear):
    """y = x W^T + s ((x Q^T) * Lambda) P^T, s = alpha / (initial rank + 1e-5); the layer's one adapter, never merged.

    PEFT adds in place, where torch.compile can lose a gradient, and scales each output twice; here the r hidden
    values are scaled. PEFT's ranknum is the rank that the layer started with, a frozen parameter that no file holds:
    a sharded tensor of one element per layer.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X (..., in) -> (..., out)."""
        down: Any = self.lora_A[ADAPTER]
        up: Any = self.lora_B[ADAPTER]
        scale = self.scaling[ADAPTER] / (self.r[ADAPTER] + 1e-5)
        hidden = nn.functional.linear(self.lora_dropout[ADAPTER](x), down * self.lora_E[ADAPTER])
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y + nn.functional.linear(hidden * scale, up).to(y.dtype)


def adopt(model: nn.Module) -> Iterator[tuple[str, PlainSVDLinear]]:
    """Give every AdaLoRA layer of model that forward; each with its name."""
    for name, module in model.named_modules():
        if type(module) is SVDLinear:
            module.__class__ = PlainSVDLinear
            del module.ranknum[ADAPTER]
            yield name, module  # type: ignore[misc]
