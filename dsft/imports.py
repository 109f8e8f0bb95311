"""Imports that fetch no compiler, and that keep their remarks to themselves."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

DISABLE = "TORCHDYNAMO_DISABLE"

REMARKS = {
    "torchao": ("Failed to load ", ".so"),
    "torch.utils._pytree": ("register_constant", "Enum"),
    "bitsandbytes.backends.cpu.ops": ("kernels-community",),
}
"""Logger -> what is in each remark that importing torchao, which transformers does by itself, or bitsandbytes, which
PEFT does, leaves on every terminal: on kernels of other machines, on how enumerations are registered, and, where a
processor has bf16, on an optional kernel. Nothing here uses any of them.
"""


def keep_remarks() -> None:
    """Leave those out; whatever else these loggers have to say is said."""
    for name, words in REMARKS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Remark) for known in logger.filters):
            logger.addFilter(_Remark(words))


class _Remark(logging.Filter):
    """False for what has all words in it."""

    def __init__(self, words: tuple[str, ...]) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not all(word in message for word in self.words)


@contextmanager
def unlogged() -> Iterator[None]:
    """Within it no library logs: what is refused is refused in one line, which says all.

    What transformers says once is forgotten afterwards, so that it is said where it comes again, in training.
    """
    was = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(was)
        once = getattr(logging.Logger, "warning_once", None)  # of transformers, if it is imported by now
        if once is not None:
            once.cache_clear()


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
