"""Ragged attention: examples laid end to end in one row, each attending to itself alone, with no mask over all of them.

Registered through transformers' AttentionInterface; the model call passes segment_lengths beside input_ids (1, T) and
position_ids (1, T) that restart at 0 per example. Beside it cached_attention, to generate. An attention module with a
child named PREFIX gives each example keys and values that come before its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from dsft_launchers.verdict import RefusedError
from torch import Tensor, nn

from dsft.protocols import PREFIX

NAME = "dsft_ragged"
CACHED = "dsft_cached"
REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")
"""Extras that some models pass and that change the scores: computing without them would be wrong."""
FLASH_WIDTH = 256
"""The widest head of flash attention in torch 2.11 to 2.13."""


def register() -> None:
    """Make NAME and CACHED known to transformers (again is harmless).

    NAME has no function for a mask: then transformers makes none. With one that gives None it would first look through
    the positions for packed examples, which a GPU has to be asked for.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, ragged_attention)
    AttentionInterface.register(CACHED, cached_attention)
    AttentionMaskInterface.register(CACHED, sdpa_mask)


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
    if dropout:  # masks over pairs of tokens would be those of a row, not of an example; build_meta sets it to 0
        raise RefusedError(f"model must drop nothing inside attention, got {dropout:g} in {type(module).__name__}")
    for name in REFUSED:
        if extras.get(name) is not None:
            raise ValueError(f"model must use plain softmax attention, got {type(module).__name__} with {name}")
    if not (getattr(module, "is_causal", True) and extras.get("is_causal", True) in (True, None)):
        raise ValueError(f"model must be causal, got {type(module).__name__} without a causal mask")
    segments = list(zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True))
    prefix, length = _prefix(module, key, extras), 0
    if prefix is not None:
        segments, length = [_behind(prefix, *segment) for segment in segments], prefix[0].shape[2]
    outputs = [
        _segment(q, k, v, dropout=dropout, scaling=scaling, window=sliding_window)[:, :, length:]
        for q, k, v in segments
    ]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1).contiguous(), None  # (1, T, H, D)


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """The sdpa attention of transformers over a cache (B, G, S, D), padded where attention_mask (B, 1, T, S) is False.

    A prefix is not kept in the cache: it comes before all of it at each call, under the mask of its own positions.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    prefix = _prefix(module, key, extras)
    if prefix is not None:
        rows, tokens, length = query.shape[0], query.shape[2], prefix[0].shape[2]
        if attention_mask is None:  # nothing is padded: the mask that sdpa would imply
            whole = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=query.device)
            attention_mask = (whole.tril() if tokens > 1 else whole)[None, None]
        seen = torch.ones(rows, 1, tokens, length, dtype=torch.bool, device=query.device)
        if sliding_window is not None:
            places = extras["position_ids"][:, None, :, None] - torch.arange(length, device=query.device)
            seen = (places < sliding_window).expand_as(seen)
        attention_mask = torch.cat([seen, attention_mask.expand(rows, -1, -1, -1)], dim=3)
        keys, values = (part.expand(rows, -1, -1, -1) for part in prefix)
        key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return sdpa_attention_forward(  # type: ignore[no-any-return]
        module, query, key, value, attention_mask, sliding_window=sliding_window, **extras
    )


def _prefix(module: nn.Module, key: Tensor, extras: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Keys and values (1, G, P, D) before those of each example, in key's type; None without such a child."""
    child = module._modules.get(PREFIX)
    if child is None:
        return None
    keys, values = child(extras.get(PREFIX))
    return keys.to(key.dtype), values.to(key.dtype)


def _behind(prefix: tuple[Tensor, Tensor], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The example as if the prefix were tokens of it, whose queries are zero and whose output nobody reads.

    So it stays one square causal attention: no mask, any kernel, windows included.
    """
    before = query.new_zeros(1, query.shape[1], prefix[0].shape[2], query.shape[3])
    return torch.cat([before, query], 2), torch.cat([prefix[0], key], 2), torch.cat([prefix[1], value], 2)


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
    if window is None or length <= window:
        return _attend(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    blocks = []
    for first in range(0, length, window):  # a block of queries sees its own keys and those of the block before
        last, oldest = min(first + window, length), max(0, first - window + 1)
        rows = torch.arange(first, last, device=query.device)[:, None]
        columns = torch.arange(oldest, last, device=query.device)[None, :]
        visible = (columns <= rows) & (columns > rows - window)
        parts = query[:, :, first:last], key[:, :, oldest:last], value[:, :, oldest:last]
        blocks.append(_attend(*parts, attn_mask=visible, dropout_p=dropout, scale=scaling))
    return torch.cat(blocks, dim=2)


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Call torch's attention so that a kernel takes it that keeps no matrix of scores: (1, H, L, D).

    On CUDA none of torch 2.11 to 2.13 takes a mask and heads in groups (pytorch#191085).
    """
    if query.shape[1] == key.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, **options)
    if "attn_mask" not in options and takes_groups(query.device.type, _computed_in(query), value.shape[3]):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    apart = groups_apart(query, key, value)
    return F.scaled_dot_product_attention(*apart, **options).flatten(0, 1)[None]


def groups_apart(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One example (1, H, L, D) and its G keys and values as G examples (G, H / G, L, D): expanded, not copied."""
    groups, each = key.shape[1], query.shape[1] // key.shape[1]
    key, value = (part[0].unsqueeze(1).expand(-1, each, -1, -1) for part in (key, value))
    return query[0].unflatten(0, (groups, each)), key, value


def takes_groups(device: str, dtype: torch.dtype, width: int) -> bool:
    """True if a fused causal kernel takes heads in groups; width: of a head. On CUDA flash attention's alone does."""
    return device != "cuda" or (dtype in (torch.bfloat16, torch.float16) and width <= FLASH_WIDTH)


def _computed_in(query: Tensor) -> torch.dtype:
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
