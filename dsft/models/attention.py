"""Ragged attention: examples laid end to end in one row, each attending to itself alone, with no mask over all of them.

Registered through transformers' AttentionInterface; the model call passes segment_lengths beside input_ids (1, T) and
position_ids (1, T) that restart at 0 per example. Beside it cached_attention, to generate. An attention module with a
child named PREFIX gives each example keys and values that come before its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from dsft_launchers.verdict import RefusedError
from torch import Tensor, nn

from dsft.models import recording
from dsft.models.capped import Cap, capped, capped_over
from dsft.models.spans import Span, check_extras, span_of
from dsft.protocols import PREFIX

NAME = "dsft_ragged"
CACHED = "dsft_cached"
FLASH_WIDTH = 256
"""The widest head of flash attention in torch 2.11 to 2.13."""
WIDER = 8
"""Coordinates that heads get for a sink: as many as fused kernels want a head's width to be a multiple of."""


def register() -> None:
    """Make NAME and CACHED known to transformers (again is harmless).

    NAME has no function for a mask: then transformers makes none. With one that gives None it would first look through
    the positions for packed examples, which a GPU has to be asked for.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, ragged_attention)
    AttentionInterface.register(recording.NAME, recording.recorded_attention)
    AttentionMaskInterface.register(recording.NAME, recording.described)
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
    """Causal attention within each segment, of what module's span shows, with its soft cap or sinks.

    query (1, H, T, D); key, value (1, G, T, D), H a multiple of G; segment_lengths sum to T. Returns (1, T, H, D).
    extras: softcap, a number; s_aux (H,), the logits of sinks. Raises RuntimeError where the call would let examples
    see each other, UnheldError for a model it cannot compute.
    """
    lengths = _checked(module, query, key, attention_mask, segment_lengths)
    if dropout:  # masks over pairs of tokens would be those of a row, not of an example; build_meta sets it to 0
        raise RefusedError(f"model must drop nothing inside attention, got {dropout:g} in {type(module).__name__}")
    check_extras(module, extras)
    how = How(span_of(module, sliding_window), query.shape[3] ** -0.5 if scaling is None else scaling)
    sinks, width, before = extras.get("s_aux"), value.shape[3], _prefix(module, key, extras)
    if extras.get("softcap") is not None:
        how = replace(how, cap=float(extras["softcap"]))
    if sinks is not None:
        query, key, value, before, sink = _widened(query, key, value, before, sinks / how.scale)
        how = replace(how, sink=sink)
    segments = list(zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True))
    length = 0
    if before is not None:
        segments, length = [_behind(before, *segment) for segment in segments], before[0].shape[2]
    outputs = [_segment(*segment, how)[:, :, length:, :width] for segment in segments]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1).contiguous(), None  # (1, T, H, D)


@dataclass(frozen=True)
class How:
    """scale: of the products; sink: key and value (1, G, 1, D) that every query sees before all others."""

    span: Span
    scale: float
    cap: float | None = None
    sink: tuple[Tensor, Tensor] | None = None


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    scaling: float | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """The sdpa attention of transformers over a cache (B, G, S, D), padded where attention_mask (B, 1, T, S) is False.

    A prefix is not kept in the cache: it comes before all of it at each call, under the mask of its own positions. Soft
    caps and sinks, which sdpa leaves out, are computed.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    check_extras(module, extras)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    cap, sinks = extras.pop("softcap", None), extras.pop("s_aux", None)
    before, rows, width = _prefix(module, key, extras), len(query), value.shape[3]
    if before is not None or cap is not None or sinks is not None:
        attention_mask = _whole_mask(query, key, attention_mask)
    if before is not None:
        assert attention_mask is not None
        span = span_of(module, sliding_window)
        attention_mask = _seen_before(span, before[0].shape[2], attention_mask, extras)
        key, value = _joined([part.expand(rows, -1, -1, -1) for part in before], key, value)
    if sinks is not None:
        assert attention_mask is not None
        query, key, value, _, sink = _widened(query, key, value, None, sinks / scale)
        attention_mask = F.pad(attention_mask, (1, 0), value=True)
        key, value = _joined([part.expand(rows, -1, -1, -1) for part in sink], key, value)
    if cap is not None:
        assert attention_mask is not None
        return capped_over(query, key, value, attention_mask, Cap(float(cap), scale)).transpose(1, 2), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scale, **extras)
    return output[..., :width], None


def _whole_mask(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """The mask (B, 1, T, S); where nothing is padded, the one that sdpa would imply."""
    if mask is None:
        whole = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = (whole.tril() if query.shape[2] > 1 else whole)[None, None]
    return mask.expand(len(query), -1, -1, -1)


def _seen_before(span: Span, length: int, mask: Tensor, extras: dict[str, Any]) -> Tensor:
    """Mask (B, 1, T, S) with length columns before it, for a prefix at positions 0, 1, ... of each row.

    Chunks are counted from the prefix too, which the mask does not know: there it is made anew, from positions that go
    on without a gap behind a row's padding.
    """
    if span.window is None and span.chunk is None:
        return F.pad(mask, (length, 0), value=True)
    positions = extras["position_ids"]  # (B, T), those of the prefix counted
    places, queries = torch.arange(length, device=mask.device), positions[:, None, :, None]
    before = span.sees(queries, places).expand(*mask.shape[:3], -1)
    if span.chunk is not None:
        keys = positions[:, -1:] - torch.arange(mask.shape[3] - 1, -1, -1, device=mask.device)
        keys = keys[:, None, None, :]
        mask = span.sees(queries, keys) & (keys >= length)
    return torch.cat([before, mask], dim=3)


def _joined(before: Sequence[Tensor], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)


def _widened(query: Tensor, key: Tensor, value: Tensor, before: Any, logits: Tensor) -> tuple[Any, ...]:
    """Query, key, value and prefix in a space WIDER than theirs, and a sink: a key whose value is 0, as an attention.

    logits (H,): of the sink, before scaling. The first new coordinate of a query is its head's, of the sink's key 1, of
    other keys 0: so a fused kernel computes sinks, and autograd their gradient.
    """
    same = query.shape[3] == value.shape[3]
    head = F.pad(logits.to(query.dtype)[None, :, None, None], (0, WIDER - 1))
    query = torch.cat([query, head.expand(len(query), -1, query.shape[2], -1)], 3)

    def wider(part: Tensor) -> Tensor:
        return F.pad(part, (0, WIDER))

    value = wider(value) if same else value  # some kernels want values as wide as keys
    sink_key = F.pad(key.new_ones(1, key.shape[1], 1, 1), (key.shape[3], WIDER - 1))
    sink_value = value.new_zeros(1, value.shape[1], 1, value.shape[3])
    if before is not None:
        before = (wider(before[0]), wider(before[1]) if same else before[1])
    return query, wider(key), value, before, (sink_key, sink_value)


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
    return torch.cat([before, query], 2), *_joined(prefix, key, value)


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


def _segment(query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
    """One example: (1, H, L, D)."""
    chunk = how.span.chunk
    if chunk is not None and query.shape[2] > chunk:  # a chunk is an example by itself
        parts = zip(query.split(chunk, 2), key.split(chunk, 2), value.split(chunk, 2), strict=True)
        return torch.cat([_windows(*part, how) for part in parts], dim=2)
    return _windows(query, key, value, how)


def _windows(query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
    length, window = query.shape[2], how.span.window
    if how.cap is not None:
        dtype = _computed_in(query)
        return capped(query.to(dtype), key.to(dtype), value.to(dtype), Cap(how.cap, how.scale, window))
    options: dict[str, Any] = {"scale": how.scale}
    if window is None or length <= window:
        if how.sink is None:
            return _attend(query, key, value, is_causal=True, **options)
        return _attend(*_behind(how.sink, query, key, value), is_causal=True, **options)[:, :, 1:]
    blocks = []
    for first in range(0, length, window):  # a block of queries sees its own keys and those of the block before
        last, oldest = min(first + window, length), max(0, first - window + 1)
        rows = torch.arange(first, last, device=query.device)[:, None]
        columns = torch.arange(oldest, last, device=query.device)[None, :]
        visible = (columns <= rows) & (columns > rows - window)
        keys, values = key[:, :, oldest:last], value[:, :, oldest:last]
        if how.sink is not None:
            keys, values = _joined(how.sink, keys, values)
            visible = F.pad(visible, (1, 0), value=True)
        blocks.append(_attend(query[:, :, first:last], keys, values, attn_mask=visible, **options))
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
