"""From token arrays to the Batch that models and objectives see."""

from collections.abc import Sequence

import numpy as np
import torch

from dsft.data.tokens import TokenSet
from dsft.objective import IGNORE, Batch


def build_batch(
    tokens: TokenSet, rows: Sequence[int], *, silent: bool = False, places: Sequence[int] | None = None
) -> Batch:
    """The examples `rows` (indices into tokens) end to end; silent: no position carries loss.

    places: where each stands in the order of its step; None for rows that are no part of one: their order here.

    targets[t] is token t + 1 of the same segment where that token is supervised, else IGNORE; so the last position of
    a segment is always IGNORE, and positions restart at 0 with each. columns: those of the set, one value per example;
    label int64, the others float64.
    """
    ids, positions, targets = [], [], []
    for segment, mask in (part for row in rows for part in tokens.segments(row)):  # (L,), (L,)
        target = np.full(len(segment), IGNORE, dtype=np.int64)
        if not silent:
            target[:-1] = np.where(mask[1:], segment[1:], IGNORE)
        ids.append(segment.astype(np.int64))
        positions.append(np.arange(len(segment), dtype=np.int64))
        targets.append(target)
    chosen = list(rows)
    columns = {name: torch.from_numpy(values[chosen]) for name, values in tokens.columns.items()}
    if "label" in columns:
        columns["label"] = columns["label"].long()
    return Batch(
        tokens=torch.from_numpy(np.concatenate(ids)),
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets)),
        lengths=tuple(map(len, ids)),
        ids=tuple(tokens.id(row) for row in rows),
        places=tuple(range(len(rows)) if places is None else places),
        members=tuple(tokens.members[chosen].tolist()),
        columns=columns,
        counts=not silent,
    )
