"""Which keys a query may see, as numbers: read off the mask function that a model hands to transformers.

A span counts positions within an example, so that examples packed in one row each begin their windows and chunks anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SPAN = "dsft_span"
"""Name of the attribute of an attention module that holds its Span."""
UNRECORDED = "dsft_unrecorded"
"""Name of the attribute of a model that says why spans are not those of its own masks; "" where all of them are."""
REFUSED = ("position_bias", "head_mask", "indices")
"""Arguments of an attention by which it changes its scores, or chooses its keys, in a way that is not computed here."""
FARTHEST = 2**20
"""Positions up to which a mask function is looked at, where the model knows as many."""
NEAR = 2**13
"""Keys from the first one on that are all compared; behind them, those around the edges of windows and chunks."""

MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""(batch, head, query's position, key's position) -> True where the query sees the key; transformers' masking_utils."""


class UnheldError(ValueError):
    """The attention of a model cannot be computed per example of a packed row; one line that names class and reason."""


@dataclass(frozen=True)
class Span:
    """Query q sees the keys k <= q with q - k < window and q // chunk == k // chunk; None: no such limit.

    recorded: read off the mask that the model makes, which then counts alone; else what its configuration says, and a
    window that the attention is called with counts too.
    """

    window: int | None = None
    chunk: int | None = None
    recorded: bool = True

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """True where a query sees a key; both int64 positions that can be broadcast."""
        seen = keys <= queries
        if self.window is not None:
            seen = seen & (queries - keys < self.window)
        if self.chunk is not None:
            seen = seen & (queries // self.chunk == keys // self.chunk)
        return seen


def span_of(module: nn.Module, window: int | None) -> Span:
    """The span of an attention module that is called with window (its argument sliding_window)."""
    span: Span | None = vars(module).get(SPAN)
    if span is None:
        return Span(window, recorded=False)
    if span.recorded or window is None or (span.window is not None and span.window <= window):
        return span
    return Span(window, span.chunk, recorded=False)


def check_extras(module: nn.Module, extras: Mapping[str, Any]) -> None:
    """Raise UnheldError if an attention is called with arguments that change scores in a way not computed here.

    Raises a plain ValueError where it is not causal, since no way of packing would help such a model.
    """
    kind = type(module).__name__
    for name in REFUSED:
        if extras.get(name) is not None:
            raise UnheldError(
                f"model must score keys by their products, soft caps and sinks alone, got {kind} with {name}"
            )
    if extras.get("softcap") is not None and extras.get("s_aux") is not None:
        raise UnheldError(f"model must have soft caps or sinks, got {kind} with both: softcap and s_aux")
    if not (getattr(module, "is_causal", True) and extras.get("is_causal", True) in (True, None)):
        raise ValueError(f"model must be causal, got {kind} without a causal mask")


@torch.no_grad()
def read_off(function: MaskFunction, reach: int, kind: str) -> Span:
    """The span that function describes for positions below reach, compared on the rows where spans would differ.

    kind: the model's class, for the message. Raises UnheldError if it is neither causal, nor a window, nor chunks.
    """
    reach = max(2, min(reach, FARTHEST))
    try:
        sees_first = _called(function, torch.arange(reach)[:, None], torch.zeros(1, 1, dtype=torch.int64))[:, 0]
        size = reach if bool(sees_first.all()) else int(sees_first.long().argmin())
        queries, keys = _places(size, reach)
        seen = _called(function, queries, keys)
    except Exception as error:  # whatever a model's own function can raise over positions: it asks for more than these
        raise UnheldError(
            f"model must mask by positions alone, got {kind}, whose mask depends on more: {type(error).__name__}"
        ) from error
    candidates = [Span()] if size == reach else [Span(window=size), Span(chunk=size)] if size else []
    for span in candidates:
        if torch.equal(seen, span.sees(queries, keys)):
            return span
    ahead = bool((seen & (keys > queries)).any())
    what = "shows tokens what follows them" if ahead else "is neither a window nor chunks"
    raise UnheldError(f"model must have causal masks, windows or chunks, got {kind}, whose mask {what}")


def _places(size: int, reach: int) -> tuple[Tensor, Tensor]:
    """Queries (q, 1) and keys (1, k) below reach where spans of size would differ, with the first NEAR keys."""
    edges = (0, 1, 2, size - 1, size, size + 1, 2 * size - 1, 2 * size, 2 * size + 1, reach // 2, reach - 1)
    queries = torch.tensor(sorted({edge for edge in edges if 0 <= edge < reach}))[:, None]
    around = torch.cat([queries, queries - size, queries // max(size, 1) * size]) + torch.arange(-32, 33)
    keys = torch.cat([around.flatten(), torch.arange(NEAR), torch.arange(0, reach, reach // 64 + 1)]).unique()
    return queries, keys[(keys >= 0) & (keys < reach)][None]


def _called(function: MaskFunction, queries: Tensor, keys: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.int64)
    return function(zero, zero, queries, keys).broadcast_to(torch.broadcast_shapes(queries.shape, keys.shape))


def configured(config: Any, layer: int) -> Span:
    """What a configuration says of a layer's attention, in the names that transformers' own models use."""
    kinds: Any = getattr(config, "layer_types", None) or ()
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    kind = kinds[layer] if layer < len(kinds) else ""
    if kind:
        window = window if kind == "sliding_attention" else None
        chunk = chunk if kind == "chunked_attention" else None
    return Span(window, None if window is not None else chunk, recorded=False)
