"""LoRA's products added in place to the base's, forward and backward: two functions under PEFT's own layer.

y = x W^T + s (x A^T) B^T. PEFT's forward keeps three tensors of y's size on the way to this one and casts x to A's
type, and autograd adds up two gradients of x; here y and the base's own gradient of x take the products, and only x and
x A^T are kept for backward.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class FusedLinear(Linear):
    """PEFT's Linear with one plain adapter that learns; whatever else is asked of it, PEFT's forward does.

    So does it outside the blocks under ZeRO-3, which gathers each module there (marked with ds_id) when it is called.
    torch.compile gets a sum that is not in place: it loses the gradient of what is changed at the edge of a graph.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """X (..., in) -> (..., out), in the type of the base's product."""
        names = self.active_adapters
        others = self.disable_adapters or self.merged or len(names) != 1 or hasattr(self, "ds_id")
        if args or kwargs or others:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        name, flat = names[0], x.reshape(-1, x.shape[-1])  # of three dimensions, a product with a bias is a view
        down, up = self.factors(name)
        dropped = self.lora_dropout[name](flat)
        if torch.compiler.is_compiling():
            y = torch.addmm(self.base_layer(flat), nn.functional.linear(dropped, down), up.T, alpha=self.scaling[name])
            return y.view(*x.shape[:-1], -1)
        handed, hidden = _Down.apply(flat, None if dropped is flat else dropped, down, _compute_dtype(flat))
        flat = handed if flat.requires_grad else flat  # else the base computed a gradient that nobody asks for
        y = _Up.apply(self.base_layer(flat), hidden, up, self.scaling[name])
        return y.view(*x.shape[:-1], -1)

    def factors(self, name: str) -> tuple[Any, Any]:
        """A (r, in) and B (out, r) of the sum."""
        return self.lora_A[name].weight, self.lora_B[name].weight


def fuse(model: nn.Module, adapter: str, kind: type[FusedLinear] = FusedLinear) -> list[FusedLinear]:
    """Give every plain LoRA linear of model the fused forward, and return them; others (DoRA) keep PEFT's."""
    plain = [m for m in model.modules() if type(m) is Linear and adapter not in m.lora_variant]
    for module in plain:
        module.__class__ = kind
    return plain  # type: ignore[return-value]  # mypy sees the class that they had


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in here."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Down(torch.autograd.Function):
    """(x, x A^T); x (T, in) is handed on to the base alone, and its gradient from there takes A's part in place.

    dropped: what A sees in place of x, None for x itself. A (r, in); the product in dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        seen = x if dropped is None else dropped
        with torch.autocast(x.device.type, enabled=False):
            hidden = seen.to(dtype) @ down.to(dtype).T  # (T, r)
        ctx.save_for_backward(seen, down)
        ctx.alone = dropped is None
        ctx.set_materialize_grads(False)
        return x.view_as(x), hidden

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        seen, down = ctx.saved_tensors  # read once: a second read recomputes under checkpointing
        grad_dropped = grad_down = None
        with torch.autocast(grad.device.type, enabled=False):
            weight = down.to(grad.dtype)
            if ctx.needs_input_grad[1]:
                grad_dropped = (grad @ weight).to(seen.dtype)
            elif ctx.alone and grad_x is not None:
                grad_x = grad_x.addmm_(grad, weight) if grad_x.dtype is grad.dtype else grad_x.add_(grad @ weight)
            if ctx.needs_input_grad[2]:
                grad_down = (grad.T @ seen.to(grad.dtype)).to(down.dtype)
        return grad_x, grad_dropped, grad_down, None


class _Up(torch.autograd.Function):
    """y += s hidden B^T in place. y (T, out), hidden (T, r), B (out, r); the product in y's type."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
        ctx.mark_dirty(y)
        with torch.autocast(y.device.type, enabled=False):
            y.addmm_(hidden.to(y.dtype), up.to(y.dtype).T, alpha=scale)
        ctx.save_for_backward(hidden, up)
        ctx.scale = scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, up = ctx.saved_tensors
        grad_hidden = grad_up = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                grad_hidden = (grad @ up.to(grad.dtype)).mul_(ctx.scale).to(hidden.dtype)
            if ctx.needs_input_grad[2]:
                grad_up = (grad.T @ hidden.to(grad.dtype)).mul_(ctx.scale).to(up.dtype)
        return grad, grad_hidden, grad_up, None
