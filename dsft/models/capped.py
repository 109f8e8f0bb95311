"""Causal attention with a soft cap on its scores, cap * tanh(score / cap), as in Gemma 2 (arXiv:2408.00118, section 2).

No fused kernel of torch has one. Scores exist for a block of queries at a time, and again in backward, so that memory
does not grow with the square of an example's length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AT_ONCE = {"cuda": 2**26}
"""Scores that exist at a time, by kind of device: 256 MiB in fp32."""
AT_ONCE_ELSEWHERE = 2**19
"""On a CPU, where a block should stay in its caches: 2 MiB."""


@dataclass(frozen=True)
class Cap:
    """cap: of the scores; scale: of the products before it; window: as Span's."""

    cap: float
    scale: float
    window: int | None = None


def capped(query: Tensor, key: Tensor, value: Tensor, how: Cap) -> Tensor:
    """One example: query (1, H, L, D), key (1, G, L, D), value (1, G, L, E), H a multiple of G -> (1, H, L, E)."""
    groups = key.shape[1]
    rows = query[0].unflatten(0, (groups, query.shape[1] // groups))  # (G, H / G, L, D)
    return _Capped.apply(rows, key[0], value[0], how).flatten(0, 1)[None]  # type: ignore[no-any-return]


def capped_over(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, how: Cap) -> Tensor:
    """Some rows over their caches, without gradients: visible (B, 1, T, S) is True where a query sees a key.

    query (B, H, T, D), key and value (B, G, S, .) -> (B, H, T, E). how: its window is not used.
    """
    assert not torch.is_grad_enabled() or not query.requires_grad, "in-place operations have no gradient"
    rows, groups = key.shape[:2]
    many = query.unflatten(1, (groups, query.shape[1] // groups)).flatten(0, 1)  # (B G, H / G, T, D)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    seen = visible.expand(-1, groups, -1, -1).flatten(0, 1)[:, None]  # (B G, 1, T, S)
    outputs = []
    for some in _rows(many, key.shape[2]):
        weights = _tanh(many[:, :, some], keys, how).mul_(how.cap)
        lowest = torch.finfo(weights.dtype).min  # not infinite: a query in the padding sees no key, and must be finite
        weights = weights.masked_fill_(~seen[:, :, some], lowest).softmax(-1)
        outputs.append(_times(weights.to(value.dtype), values).to(query.dtype))
    together: Tensor = torch.cat(outputs, 2).unflatten(0, (rows, groups))
    return together.flatten(1, 2)  # (B, H, T, E)


class _Capped(torch.autograd.Function):
    """query (G, R, L, D), key (G, L, D), value (G, L, E) -> (G, R, L, E): R heads share a group's keys and values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: Cap) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.how = how
        output = query.new_empty(*query.shape[:3], value.shape[2])
        with torch.autocast(query.device.type, enabled=False):
            for rows, columns, hidden in _blocks(query, how):
                weights = _weights(_tanh(query[:, :, rows], key[:, columns], how), hidden, how)
                output[:, :, rows] = _times(weights.to(value.dtype), value[:, columns])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        how = ctx.how
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(part, dtype=torch.float32) for part in (key, value))
        with torch.autocast(grad.device.type, enabled=False):
            for rows, columns, hidden in _blocks(query, how):
                tanh, asked = _tanh(query[:, :, rows], key[:, columns], how), grad[:, :, rows]
                weights = _weights(tanh.clone(), hidden, how)
                grad_value[:, columns] += _summed(weights.to(value.dtype), asked)
                slope = _times(asked, value[:, columns].mT)
                slope.sub_((slope * weights).sum(-1, keepdim=True)).mul_(weights)  # of the softmax
                slope.mul_(tanh.square_().neg_().add_(1)).mul_(how.scale)  # of the cap, and of the scale
                slope = slope.to(key.dtype)
                grad_query[:, :, rows] = _times(slope, key[:, columns])
                grad_key[:, columns] += _summed(slope, query[:, :, rows])
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _blocks(query: Tensor, how: Cap) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries, the keys that any of them sees, (n, m) True where one does not) of query (G, R, L, D)."""
    for rows in _rows(query, query.shape[2]):
        oldest = 0 if how.window is None else max(0, rows.start - how.window + 1)
        places = torch.arange(oldest, rows.stop, device=query.device)
        queries = places[rows.start - oldest :, None]
        hidden = places > queries
        if how.window is not None:
            hidden |= places <= queries - how.window
        yield rows, slice(oldest, rows.stop), hidden


def _rows(query: Tensor, keys: int) -> Iterator[slice]:
    """Queries whose scores with so many keys exist at a time, of query (., R, L, D)."""
    length = query.shape[2]
    most = AT_ONCE.get(query.device.type, AT_ONCE_ELSEWHERE)
    size = max(16, most // (query.shape[0] * query.shape[1] * keys))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _tanh(query: Tensor, key: Tensor, how: Cap) -> Tensor:
    """tanh(scale q k / cap) in fp32: query (G, R, n, D), key (G, m, D) -> (G, R, n, m)."""
    return _times(query, key.mT).mul_(how.scale / how.cap).tanh_()


def _weights(tanh: Tensor, hidden: Tensor, how: Cap) -> Tensor:
    """Softmax of the capped scores that are seen, in the memory of tanh."""
    return tanh.mul_(how.cap).masked_fill_(hidden, float("-inf")).softmax(-1)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """(G, R, n, A) times (G, A, m) -> (G, R, n, m), summed and kept in fp32."""
    product: Tensor = _product(left.flatten(1, 2), right).unflatten(1, left.shape[1:3])
    return product


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """Sum over R and n of (G, R, n, m) times (G, R, n, A) -> (G, m, A) in fp32."""
    return _product(left.flatten(1, 2).mT, right.flatten(1, 2))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched product in fp32 of factors in one dtype; a GPU multiplies them as they are."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
