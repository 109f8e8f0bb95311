"""Imports that fetch no compiler."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

DISABLE = "TORCHDYNAMO_DISABLE"


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within it torch.compile gives back what it is given.

    For the first import of bitsandbytes, which PEFT imports too: it compiles functions that we do not call where speed
    counts, and the compiler alone is 2 of the 11 CPU seconds of a short run. A user's own stays what it is.
    """
    was = os.environ.get(DISABLE)
    os.environ[DISABLE] = "1"
    try:
        yield
    finally:
        if was is None:
            del os.environ[DISABLE]
        else:
            os.environ[DISABLE] = was
