"""From token arrays to the Batch that models and objectives see."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsft.data.tokens import BESIDE, SCORES, TokenSet
from dsft.objective import IGNORE, Batch

Segment = tuple[NDArray[np.int32], NDArray[np.bool_]]
"""Tokens (L,) and mask (L,), True where one is supervised."""


def build_batch(
    tokens: TokenSet,
    rows: Sequence[int],
    *,
    silent: bool = False,
    places: Sequence[int] | None = None,
    mismatched: bool = False,
) -> Batch:
    """The examples `rows` (indices into tokens) end to end; silent: they are not to count.

    places: where each stands in the order of its step; None for rows that are no part of one: their order here.
    mismatched: with a batch beside it, of the same prompts with answers to others (see TokenSet.mismatch).

    targets[t] is token t + 1 of the same segment where that token is supervised, else IGNORE; so the last position of
    a segment is always IGNORE, and positions restart at 0 with each. columns: those of the set, one value per example;
    label int64, the others float64; and SCORES, one per supervised token, where the set has them.
    """
    chosen = list(rows)
    ids = tuple(tokens.id(row) for row in rows)
    at = tuple(range(len(rows)) if places is None else places)
    columns = {name: torch.from_numpy(values[chosen]) for name, values in tokens.columns.items()}
    if "label" in columns:
        columns["label"] = columns["label"].long()
    columns |= _scores(tokens, SCORES, chosen)
    beside = None
    if mismatched:
        beside = Batch(
            *_laid_out([tokens.mismatch(row) for row in rows]), ids=ids, places=at, members=(1,) * len(rows),
            columns=_scores(tokens, BESIDE, chosen), counts=not silent,
        )  # fmt: skip
    parts = [part for row in rows for part in tokens.segments(row)]
    members = tuple(tokens.members[chosen].tolist())
    return Batch(
        *_laid_out(parts), ids=ids, places=at, members=members, columns=columns, counts=not silent, beside=beside
    )


def _scores(tokens: TokenSet, name: str, rows: Sequence[int]) -> dict[str, Tensor]:
    """The column SCORES (P,) of these rows, from the array of that name, if the set has it."""
    if name not in tokens.arrays:
        return {}
    return {SCORES: torch.from_numpy(np.concatenate([tokens.scores(name, row) for row in rows]))}


def _laid_out(segments: Sequence[Segment]) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Tokens, positions and targets (T,) of segments end to end, and their lengths."""
    targets = []
    for tokens, mask in segments:
        target = np.full(len(tokens), IGNORE, dtype=np.int64)
        target[:-1] = np.where(mask[1:], tokens[1:], IGNORE)
        targets.append(target)
    lengths = tuple(len(tokens) for tokens, _ in segments)
    return (
        torch.from_numpy(np.concatenate([tokens for tokens, _ in segments]).astype(np.int64)),
        torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        torch.from_numpy(np.concatenate(targets)),
        lengths,
    )
