"""A linear that computes with its weight, and perhaps its input, rounded to a grid; what learns is not rounded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dsft.methods.grid import Grid

Whole = Callable[..., Tensor]
"""(type of the product, *parameters) -> weight (out, in) fp32, as rounding is to see it."""


class Rounded(nn.Linear):
    """An nn.Linear whose weight is rounded at each use (see branches.grow). grid: how."""

    grid: Grid

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in) -> (..., out), in the type that F.linear would return."""
        return product(x, self.bias, self.grid, in_type, self.weight)


def in_type(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """Weight (out, in) as a product in dtype sees it, fp32: FSDP2 hands it over in dtype, so do the others."""
    return weight.to(dtype).float()


def product(x: Tensor, bias: Tensor | None, grid: Grid, whole: Whole, *parts: Tensor) -> Tensor:
    """Rounded x times rounded whole(*parts), transposed, plus bias: x (..., in) -> (..., out)."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    bias = None if bias is None else bias.to(dtype)
    if torch.compiler.is_compiling():
        with torch.autocast(device, enabled=False):
            return linear(*_rounded(x.to(dtype), grid, whole, parts), bias)
    y: Tensor = _Product.apply(x.to(dtype), bias, grid, whole, *parts)
    return y


def _rounded(x: Tensor, grid: Grid, whole: Whole, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What is multiplied, in x's type: the scales are those of whole weights in fp32."""
    return grid.seen(x), grid.fake(whole(x.dtype, *parts)).to(x.dtype)


class _Product(torch.autograd.Function):
    """Keeps x and the parameters themselves, which sharding gathers again, and rounds anew in backward.

    Left to autograd, a rounded copy of the whole model would live from forward to backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, grid: Grid, whole: Whole, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parts)
        ctx.grid, ctx.whole = grid, whole
        with torch.autocast(x.device.type, enabled=False):
            return linear(*_rounded(x, grid, whole, parts), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # read once: a second read recomputes, or fails, under checkpointing
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        flat = grad.reshape(-1, grad.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            with torch.enable_grad():
                leaves = [part.detach().requires_grad_(need) for part, need in zip(saved, needs, strict=True)]
                made = _rounded(leaves[0], ctx.grid, ctx.whole, tuple(leaves[1:]))
            x, weight = (tensor.detach() for tensor in made)
            of_made = (grad @ weight if needs[0] else None, flat.T @ x.flatten(0, -2) if any(needs[1:]) else None)
            grads = _back([*zip(made, of_made, strict=True)], leaves)
            bias = flat.sum(0) if ctx.needs_input_grad[1] else None
        return grads[0], bias, None, None, *grads[1:]


def _back(made: list[tuple[Tensor, Tensor | None]], leaves: list[Tensor]) -> list[Tensor | None]:
    """Gradients of leaves from those of what was made of them; None of a leaf that needs none."""
    given = [(tensor, grad) for tensor, grad in made if grad is not None]
    learning = [leaf for leaf in leaves if leaf.requires_grad]
    if not learning:
        return [None for _ in leaves]
    found = iter(torch.autograd.grad([tensor for tensor, _ in given], learning, [grad for _, grad in given]))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]
