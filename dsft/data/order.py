"""The order of examples: pure functions of (step, seed), in which no rank and no world size occurs."""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dsft.config import Train


def batch_rows(step: int, *, seed: int, num_rows: int, batch_size: int, shuffle: bool) -> list[int]:
    """The rows of optimizer step `step` (counted from 1), batch_size of them, in global order.

    Epoch e is a permutation of all rows told by (seed, e), or the file order without shuffle; the epochs follow each
    other without a gap, so a batch may hold the end of one and the start of the next.
    """
    assert step >= 1
    assert num_rows >= 1
    start = (step - 1) * batch_size
    rows: list[int] = []
    while len(rows) < batch_size:
        epoch, first = divmod(start + len(rows), num_rows)
        last = min(num_rows, first + batch_size - len(rows))
        if shuffle:
            rows += permutation(num_rows, seed, epoch)[first:last].tolist()
        else:
            rows += range(first, last)
    return rows


def total_steps(train: Train, num_rows: int) -> int:
    """Optimizer steps of a run."""
    return train.steps or steps_for(train.epochs or 1.0, num_rows=num_rows, batch_size=train.global_batch_size)


def steps_for(epochs: float, *, num_rows: int, batch_size: int) -> int:
    """Optimizer steps that show at least `epochs` times num_rows examples; 1 at the least."""
    return max(1, math.ceil(epochs * num_rows / batch_size - 1e-9))


@lru_cache(maxsize=4)
def permutation(num_rows: int, *key: int) -> NDArray[np.int64]:
    """A read-only permutation (num_rows,) told by key.

    Sorted raw bits, not Generator.permutation: numpy keeps the bit streams of SeedSequence and PCG64 the same in all
    its versions, those of Generator's methods not (NEP 19), and a resumed run must see the same order.
    """
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(num_rows)
    order = np.argsort(bits, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order
