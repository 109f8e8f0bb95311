"""From token arrays to the Batch that models and objectives see."""

from collections.abc import Sequence

import numpy as np
import torch

from dsft.data.tokens import TokenSet
from dsft.objective import IGNORE, Batch


def build_batch(
    tokens: TokenSet, rows: Sequence[int], *, silent: bool = False, places: Sequence[int] | None = None
) -> Batch:
    """The examples `rows` (indices into tokens) end to end; silent: they are not to count.

    places: where each stands in the order of its step; None for rows that are no part of one: their order here.

    targets[t] is token t + 1 of the same example where that token is supervised, else IGNORE; so the last position of
    an example is always IGNORE, and positions restart at 0 with each.
    """
    ids, positions, targets = [], [], []
    for row in rows:
        example, mask = tokens.example(row)  # (L,), (L,)
        target = np.full(len(example), IGNORE, dtype=np.int64)
        target[:-1] = np.where(mask[1:], example[1:], IGNORE)
        ids.append(example.astype(np.int64))
        positions.append(np.arange(len(example), dtype=np.int64))
        targets.append(target)
    return Batch(
        tokens=torch.from_numpy(np.concatenate(ids)),
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets)),
        lengths=tuple(map(len, ids)),
        ids=tuple(tokens.id(row) for row in rows),
        places=tuple(range(len(rows)) if places is None else places),
        members=(1,) * len(rows),
        counts=not silent,
    )
