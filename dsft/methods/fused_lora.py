"""LoRA's product added to the base's in place: one function in forward and backward, under PEFT's own layer.

y = x W^T + s (x A^T) B^T. PEFT's forward keeps three tensors of y's size on the way to this one and casts x to A's
type; here y itself takes the product, and only x and x A^T are kept for backward.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class FusedLinear(Linear):
    """PEFT's Linear with one plain adapter that learns; whatever else is asked of it, PEFT's forward does.

    So does it under torch.compile, which loses the gradient of what is changed in place at the edge of a graph, and
    outside the blocks under ZeRO-3, which gathers each module there (marked with ds_id) when it is called.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X (..., in) -> (..., out), in the type of the base's product."""
        names = self.active_adapters
        others = self.disable_adapters or self.merged or len(names) != 1 or hasattr(self, "ds_id")
        if args or kwargs or others or torch.compiler.is_compiling():
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        name, flat = names[0], x.reshape(-1, x.shape[-1])  # of three dimensions, a product with a bias is a view
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        y = _Add.apply(self.base_layer(flat), self.lora_dropout[name](flat), down, up, self.scaling[name])
        return y.view(*x.shape[:-1], -1)


def fuse(model: nn.Module, adapter: str) -> None:
    """Give every plain LoRA linear of model the fused forward; others (DoRA) keep PEFT's."""
    for module in model.modules():
        if type(module) is Linear and adapter not in module.lora_variant:
            module.__class__ = FusedLinear


class _Add(torch.autograd.Function):
    """y += s (x A^T) B^T in place. y (T, out), x (T, in), A (r, in), B (out, r); products in y's type."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        ctx.mark_dirty(y)
        with torch.autocast(y.device.type, enabled=False):
            hidden = x.to(y.dtype) @ down.to(y.dtype).T  # (T, r)
            y.addmm_(hidden, up.to(y.dtype).T, alpha=scale)
        ctx.save_for_backward(x, hidden, down, up)
        ctx.scale = scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, hidden, down, up = ctx.saved_tensors  # read once: a second read recomputes under checkpointing
        grad_x = grad_down = grad_up = None
        with torch.autocast(grad.device.type, enabled=False):
            grad_hidden = (grad @ up.to(grad.dtype)).mul_(ctx.scale)  # (T, r)
            if ctx.needs_input_grad[1]:
                grad_x = (grad_hidden @ down.to(grad.dtype)).to(x.dtype)
            if ctx.needs_input_grad[2]:
                grad_down = (grad_hidden.T @ x.to(grad.dtype)).to(down.dtype)
            if ctx.needs_input_grad[3]:
                grad_up = (grad.T @ hidden).mul_(ctx.scale).to(up.dtype)
        return grad, grad_x, grad_down, grad_up, None
