"""Bottleneck adapters: down to m numbers, a non-linearity, up again; in series with a module or beside it.

Source: Houlsby et al. 2019, arXiv:1902.00751; He et al. 2022, arXiv:2110.04366.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsft.methods.branches import grow, width
from dsft.methods.native import Native

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}
"""Values of method.activation; gelu_new is the tanh approximation, silu is swish with beta 1."""


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Native):
    """What the bottleneck methods share: m = D / reduction_factor numbers, 2 m D + m + D parameters per adapter.

    W_up and both biases start at 0, so the start is the base; W_down ~ U(-1/sqrt(D), 1/sqrt(D)).
    """

    reduction_factor: int
    activation: str
    dropout: float

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.reduction_factor < 1:
            raise ValueError(f"method.reduction_factor must be 1 or more, got {self.reduction_factor}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"method.activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"method.dropout must be in [0, 1), got {self.dropout}")

    def size(self, model: nn.Module) -> int:
        """Size m of the bottleneck. Raises ValueError if reduction_factor does not divide the model's width."""
        size, rest = divmod(width(model), self.reduction_factor)
        if rest:
            near = next(f for f in range(self.reduction_factor, 0, -1) if width(model) % f == 0)
            raise ValueError(
                f"method.reduction_factor must divide the model's width, {width(model)}, got {self.reduction_factor}; "
                f"e.g. {near}"
            )
        return size

    def adapter(self, model: nn.Module, device: torch.device, scale: float = 1.0) -> "Adapter":
        """A new adapter for the residual stream of model."""
        outer, inner = width(model), self.size(model)
        down, up = (Projection(*sizes, device=device) for sizes in ((outer, inner), (inner, outer)))
        return Adapter(down, up, self.activation, self.dropout, scale)

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Kaiming (a = sqrt 5) for what goes down, 0 for all else."""
        value = torch.zeros(param.shape, dtype=torch.float32)
        if name.endswith("adapter.down.weight"):
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))
        return value


class Projection(nn.Linear):
    """A linear in fp32 that computes in its input's type, with autocast or without."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        super().__init__(inputs, outputs, device=device, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in) -> (..., out)."""
        assert self.bias is not None
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Adapter(nn.Module):
    """x -> s up(drop(phi(down(x)))), all (..., D)."""

    def __init__(self, down: nn.Module, up: nn.Module, activation: str, dropout: float, scale: float) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.activation, self.scale = activation, scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """X (..., D) -> (..., D)."""
        hidden = self.dropout(ACTIVATIONS[self.activation](self.down(x)))  # (..., m)
        y: Tensor = self.up(hidden)
        return y if self.scale == 1 else y * self.scale


class After(nn.Module):
    """A module with an adapter in series: y -> y + adapter(y)."""

    adapter: Adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own; of a tuple, the first value takes the adapter."""
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        return _on_first(output, self.adapter)


class Beside(nn.Module):
    """A module with an adapter in parallel: y(x) -> y(x) + adapter(x); x is its first argument."""

    adapter: Adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own; of a tuple, the first value takes the adapter."""
        beside = self.adapter(args[0] if args else next(iter(kwargs.values())))
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        return _on_first(output, lambda _: beside)


def put(adapter: Adapter, module: nn.Module, around: type[After | Beside]) -> None:
    """Let adapter learn, after module or beside it."""
    module.adapter = adapter
    grow(module, around)


def device_of(module: nn.Module) -> torch.device:
    """Where the module's tensors are, meta included."""
    return next(module.parameters()).device


def train_norms(model: nn.Module, names: list[str]) -> None:
    """Let the norms learn."""
    for name in names:
        model.get_submodule(name).requires_grad_(True)


def _on_first(output: Any, adapter: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, tuple):
        return (_on_first(output[0], adapter), *output[1:])
    return output + adapter(output).to(output.dtype)
