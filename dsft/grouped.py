"""Multiply rows that are sorted by expert: each group of rows times the weight of its expert.

torch's grouped_mm computes it where it can: rows of multiples of 16 bytes, 16 or 32 bits. Elsewhere a CPU takes the
groups one by one, which is as fast there, and a GPU pads the sides with zeros, since a loop here would have to wait for
the ends of the groups (as torch's own does where it has no kernel for a GPU). Both give the same numbers.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "dsft_grouped"
"""Name of the forward pass of fused experts (models/experts.py) in transformers' interface."""

BESIDE = "lora_"
"""Beginning of the name of a child of a module of experts; the end is that of a stack of its weights.

The child, called with the stack's product (S, out), the rows (S, in) and their Routes, gives the product that is used.
"""

ALIGNED = 16
"""Bytes that the rows of both factors and of the result must be a multiple of, for grouped_mm."""

MULTIPLIES = "multiplies_stacks"
"""Name of an attribute of modules that read their stacks by dsft.moved.stack and multiply them by product."""

LOOPS = ("cpu",)
"""Devices that take the groups one by one where grouped_mm does not take them."""


def computes(module: Any) -> bool:
    """True if the module multiplies its stacks by product: the methods' own, and fused experts that models/experts.py
    computes, in a model that build_meta has built.
    """
    kind = vars(module).get("config")  # of others' modules it may be anything
    routed = hasattr(module, "has_gate") and getattr(kind, "_experts_implementation", None) == NAME
    return routed or hasattr(module, MULTIPLIES)


@dataclass(frozen=True)
class Routes:
    """Pairs of a token and one of its k slots, sorted by expert, in order of tokens within one.

    order (S,): pair token * k + slot of each row; back (S,): row of each pair; experts (S,): expert of each row; ends
    (E,) int32: row after the last one of each expert; slots: k.
    """

    order: Tensor
    back: Tensor
    experts: Tensor
    ends: Tensor
    slots: int


def routes(index: Tensor, count: int) -> Routes:
    """Sort the choices index (T, k) among count experts. Nothing waits for a GPU."""
    experts, order = index.reshape(-1).sort(stable=True)
    rows = torch.arange(len(order), device=order.device)
    back = torch.empty_like(order).scatter_(0, order, rows)
    numbers = torch.arange(count, device=order.device, dtype=experts.dtype)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    return Routes(order, back, experts, ends, index.shape[-1])


def take(x: Tensor, routes: Routes) -> Tensor:
    """Rows x (T, d) of tokens -> (S, d), one for each pair, sorted by expert."""
    return cast(Tensor, torch.ops.dsft.taken(x, routes.order // routes.slots, routes.back, routes.slots))


def combine(y: Tensor, weights: Tensor, routes: Routes) -> Tensor:
    """Sum over slots of weights (T, k) times y (S, d), sorted by expert -> (T, d) in the wider of their types.

    The slots of a token are summed in their order, so that no other token changes a bit.
    """
    pairs: Tensor = torch.ops.dsft.taken(y, routes.back, routes.order, 1)
    return (pairs.view(-1, routes.slots, y.shape[-1]) * weights.unsqueeze(-1)).sum(1)


def product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows x (S, in) of group e times weight[e] transposed -> (S, out); weight (E, out, in), any strides, any type.

    ends (E,) int32: row after the last of each group; the last is S. Under autocast both factors take its type, as
    those of a linear do.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight = weight.to(x.dtype)
    out = weight.shape[1]
    if x.device.type not in LOOPS and not _aligned(x, weight):
        step = ALIGNED // x.element_size()
        more = [-side % step for side in weight.shape[1:]]
        x, weight = F.pad(x, (0, more[1])), F.pad(weight, (0, more[1], 0, more[0]))
    y: Tensor = torch.ops.dsft.grouped(x, weight, ends)
    return y if y.shape[1] == out else y[:, :out]


def _aligned(x: Tensor, weight: Tensor) -> bool:
    size = x.element_size()
    return size in (2, 4) and all(side * size % ALIGNED == 0 for side in weight.shape[1:])


def _kernel(*factors: Tensor) -> Any:
    """Return torch's grouped_mm where it takes these factors: rows must lie a multiple of ALIGNED bytes apart."""
    found = getattr(F, "grouped_mm", None)
    for factor in factors:
        size, strides = factor.element_size(), factor.stride()[-2:]
        if size not in (2, 4) or 1 not in strides or max(strides) * size % ALIGNED:
            return None
    return found


@torch.library.custom_op("dsft::taken", mutates_args=())
def taken(x: Tensor, rows: Tensor, back: Tensor, slots: int) -> Tensor:
    """x.index_select(0, rows), where each row of x is taken slots times, and back (its T * slots places) finds them.

    It has a backward of its own: that of an index adds rows one by one in the type of x, in any order on a GPU.
    """
    return x.index_select(0, rows)


@torch.library.custom_op("dsft::grouped", mutates_args=())
def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See product; both factors have one type."""
    y = x.new_empty(len(x), weight.shape[1])
    if len(x) and (kernel := _kernel(x, weight, y)) is not None:
        return cast(Tensor, kernel(x, weight.transpose(-2, -1), offs=ends))
    for expert, rows in _groups(ends):
        torch.mm(x[rows], weight[expert].T, out=y[rows])
    return y


@torch.library.custom_op("dsft::grouped_outer", mutates_args=())
def grouped_outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Sum over the rows of group e of grad (S, out) times x (S, in) -> (E, out, in): the gradient of a weight."""
    found = grad.new_zeros(len(ends), grad.shape[1], x.shape[1])
    if len(x) and (kernel := _kernel(grad, x)) is not None:
        return cast(Tensor, kernel(grad.T, x, offs=ends))
    for expert, rows in _groups(ends):
        torch.mm(grad[rows].T, x[rows], out=found[expert])
    return found


def _groups(ends: Tensor) -> list[tuple[int, slice]]:
    pairs = enumerate(pairwise([0, *ends.tolist()]))
    return [(expert, slice(first, last)) for expert, (first, last) in pairs if last > first]


@taken.register_fake
def _(x: Tensor, rows: Tensor, back: Tensor, slots: int) -> Tensor:
    return x.new_empty(rows.shape[0], x.shape[1])


@grouped.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return grad.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _keep_places(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    _, _, back, ctx.slots = inputs
    ctx.save_for_backward(back)


def _put_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (back,) = ctx.saved_tensors
    pairs = grad.index_select(0, back)
    return (pairs if ctx.slots == 1 else pairs.view(-1, ctx.slots, grad.shape[-1]).sum(1)), None, None, None


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, weight, ends = inputs
    learns, passes = ctx.needs_input_grad[1], ctx.needs_input_grad[0]
    ctx.save_for_backward(x if learns else None, weight if passes else None, ends)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    for_x = None if weight is None else torch.ops.dsft.grouped(grad, weight.transpose(-2, -1), ends)
    return for_x, None if x is None else torch.ops.dsft.grouped_outer(grad, x, ends), None


taken.register_autograd(_put_back, setup_context=_keep_places)
grouped.register_autograd(_backward, setup_context=_keep)
