"""The forward pass of fused experts, hung into transformers' interface for experts: one for every family that has it.

The classes of transformers say by flags how they keep their weights (has_gate, has_bias, is_transposed,
has_post_expert_norm) and have a method for their gate; nothing here knows a family.
"""

from typing import Any, cast

from torch import Tensor, nn

from dsft import grouped
from dsft.grouped import BESIDE, NAME, Routes
from dsft.moved import stack
from dsft.packed import PackedStack, packed_weights


def register() -> None:
    """Make NAME known to transformers (again is harmless)."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)


def forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Hidden states (T, d), experts index (T, k) chosen by each token, their weights (T, k) -> (T, d)."""
    routes = grouped.routes(index, module.num_experts)
    rows = grouped.take(hidden, routes)
    first = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", rows, routes)
    first = module._apply_gate(first) if module.has_gate else module.act_fn(first)
    last = _linear(module, "down_proj", first, routes)
    if getattr(module, "has_post_expert_norm", False):  # a flag that transformers 5.17 has not
        last = module.post_expert_norm(last)
    return grouped.combine(last, weights, routes).to(hidden.dtype)


def _linear(module: nn.Module, name: str, rows: Tensor, routes: Routes) -> Tensor:
    """Rows (S, in) times the weights (E, out, in) called name, kept transposed, as bytes, or neither; and their bias.

    A child of the module that stands beside these weights adds its own product.
    """
    packed = packed_weights(module).get(name)
    if packed is None:
        weight = stack(module, name)
        y = grouped.product(rows, weight.transpose(1, 2) if module.is_transposed else weight, routes.ends)
    else:
        y = cast(PackedStack, packed).product(module, rows, routes.ends)
    bias: Tensor | None = getattr(module, f"{name}_bias") if module.has_bias else None
    y = y if bias is None else y + bias[routes.experts].to(y.dtype)
    beside = module._modules.get(f"{BESIDE}{name}")
    return y if beside is None else beside(y, rows, routes)
