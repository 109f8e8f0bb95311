"""Memory of short-lived tensors goes back to the system at once, while a model is loaded."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
SMALL_BYTES = 128 * 2**10
"""glibc's first threshold: from this size on a block is mapped by itself, and unmapped when it is freed."""
LARGE_BYTES = 32 * 2**20
"""Where glibc's own adjustment of that threshold ends (DEFAULT_MMAP_THRESHOLD_MAX, malloc.c)."""


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Within this block freed tensors leave the process; afterwards glibc reuses blocks under 32 MiB, as is its way.

    glibc raises its threshold with every large block that is freed, and then keeps such blocks in a heap between
    longer-lived shards: packing 2 GB of linears to 4 bits so left 1 GB behind. Without glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, SMALL_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGE_BYTES)
