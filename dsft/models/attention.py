"""Ragged attention: examples laid end to end in one row, each attending to itself alone, with no mask over all of them.

Registered through transformers' AttentionInterface; the model call passes segment_lengths beside input_ids (1, T) and
position_ids (1, T) that restart at 0 per example.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "dsft_ragged"
REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")
"""Extras that some models pass and that change the scores: computing without them would be wrong."""


def register() -> None:
    """Make NAME known to transformers (again is harmless)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, ragged_attention)
    AttentionMaskInterface.register(NAME, no_mask)


def no_mask(*_: Any, **__: Any) -> None:
    """No mask: the segments say who attends to whom."""


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segment_lengths: tuple[int, ...] | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

    query (1, H, T, D); key, value (1, G, T, D), H a multiple of G; segment_lengths sum to T. Returns (1, T, H, D).
    Raises RuntimeError where the call would let examples see each other, ValueError for a model it cannot compute.
    """
    lengths = _checked(module, query, key, attention_mask, segment_lengths)
    for name in REFUSED:
        if extras.get(name) is not None:
            raise ValueError(f"model must use plain softmax attention, got {type(module).__name__} with {name}")
    if not (getattr(module, "is_causal", True) and extras.get("is_causal", True) in (True, None)):
        raise ValueError(f"model must be causal, got {type(module).__name__} without a causal mask")
    segments = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [_segment(q, k, v, dropout=dropout, scaling=scaling, window=sliding_window) for q, k, v in segments]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1).contiguous(), None  # (1, T, H, D)


def _checked(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, lengths: tuple[int, ...] | None
) -> list[int]:
    name = type(module).__name__
    if lengths is None:
        raise RuntimeError(f"{name} was called without segment_lengths: packed examples would attend to each other")
    if mask is not None:
        raise RuntimeError(f"{name} got an attention mask beside segment_lengths: give one row (1, T) without a mask")
    rows, tokens = query.shape[0], query.shape[2]
    if rows != 1 or key.shape[2] != tokens:
        raise RuntimeError(
            f"{name} must get one row without a cache, got {rows} rows, {tokens} queries, {key.shape[2]} keys"
        )
    if sum(lengths) != tokens or min(lengths) < 1:
        raise RuntimeError(f"segment_lengths must be 1 or more and sum to {tokens} tokens, got {lengths}")
    return list(lengths)


def _segment(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """One example: (1, H, L, D)."""
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    blocks = []
    for first in range(0, length, window):  # a block of queries sees its own keys and those of the block before
        last, oldest = min(first + window, length), max(0, first - window + 1)
        rows = torch.arange(first, last, device=query.device)[:, None]
        columns = torch.arange(oldest, last, device=query.device)[None, :]
        visible = (columns <= rows) & (columns > rows - window)
        block = F.scaled_dot_product_attention(
            query[:, :, first:last],
            key[:, :, oldest:last],
            value[:, :, oldest:last],
            attn_mask=visible,
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=grouped,
        )
        blocks.append(block)
    return torch.cat(blocks, dim=2)
