"""The arithmetic that a step cannot do without, and how fast this machine does a plain product of the model's shapes.

Counted: products with the weights of the blocks' linears and fused experts, and of the head. Not counted: attention's
own products, an adapter's, norms, what recomputation repeats.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsft.packed import stacked
from dsft.protocols import Anatomy


@dataclass(frozen=True)
class Work:
    """FLOP of one step. per_token: for each real token, in the blocks; per_supervised: for each that carries loss."""

    per_token: float
    per_supervised: float

    def of(self, tokens: float, supervised: float) -> float:
        """FLOP for so many real tokens, so many of them supervised."""
        return self.per_token * tokens + self.per_supervised * supervised


def work(model: Any, anatomy: Anatomy) -> Work:
    """What a step of model must do, by what learns in it (requires_grad); the model may be on meta or sharded.

    A weight (in, out) costs 2 x in x out forward, as much again for the gradient of its input where something that
    learns lies in its block or before it, and as much again where it learns itself. Of E fused experts a token uses
    config.num_experts_per_tok; they are left out where the configuration has no such number.
    """
    learning = {name for name, param in model.named_parameters() if param.requires_grad}
    first = _first_block(learning, anatomy)
    blocks = 0.0
    for name in anatomy.linears:
        linear = base_linear(model, name)
        passes = 1 + (_block(name, anatomy) >= first) + _learns(linear)
        blocks += 2 * linear.in_features * linear.out_features * passes
    active = getattr(model.config, "num_experts_per_tok", None) or 0
    for name in anatomy.experts:
        for key, shape in stacked(model.get_submodule(name)).items():
            passes = 1 + (_block(name, anatomy) >= first) + (f"{name}.{key}" in learning)
            blocks += 2 * math.prod(shape[1:]) * active * passes
    head = base_linear(model, anatomy.head)
    before = any(not name.startswith(f"{anatomy.head}.") for name in learning)
    return Work(blocks, 2.0 * head.in_features * head.out_features * (1 + before + _learns(head)))


def base_linear(model: nn.Module, name: str) -> nn.Linear:
    """The base's own linear called name, also where a method has put its layer around it."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Linear):
        return module
    return next(inner for inner in module.modules() if isinstance(inner, nn.Linear) and not _learns(inner))


def widest(model: nn.Module, anatomy: Anatomy) -> tuple[int, int]:
    """(in, out) of the largest linear of the blocks, the head's where they have none."""
    linears = [base_linear(model, name) for name in anatomy.linears] or [base_linear(model, anatomy.head)]
    largest = max(linears, key=lambda linear: linear.in_features * linear.out_features)
    return largest.in_features, largest.out_features


def matmul_ceiling(
    tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *, budget_s: float = 0.5
) -> float:
    """FLOP per second of x W^T, the best of as many as budget_s allows after one; x (tokens, in), W (out, in) = shape.

    Draws from no random stream of the run.
    """
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(rows, shape[0], dtype=dtype, device=device, generator=generator) for rows in (tokens, shape[1])
    )
    _timed(x, weight)
    best, until = math.inf, time.perf_counter() + budget_s
    while best == math.inf or time.perf_counter() < until:
        best = min(best, _timed(x, weight))
    return 2 * tokens * shape[0] * shape[1] / best


@torch.no_grad()
def _timed(x: Tensor, weight: Tensor) -> float:
    _wait(x.device)
    start = time.perf_counter()
    F.linear(x, weight)
    _wait(x.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _learns(linear: nn.Module) -> bool:
    weight = linear._parameters.get("weight")  # a packed linear has none: reading .weight would unpack it
    return weight is not None and weight.requires_grad


def _block(name: str, anatomy: Anatomy) -> int:
    return next(index for index, block in enumerate(anatomy.blocks) if name.startswith(f"{block}."))


def _first_block(learning: set[str], anatomy: Anatomy) -> int:
    """Index of the first block that needs gradients; their number if none does."""
    if any(name.startswith(f"{anatomy.embedding}.") for name in learning):
        return 0
    found = (index for index, block in enumerate(anatomy.blocks) if any(n.startswith(f"{block}.") for n in learning))
    return next(found, len(anatomy.blocks))
