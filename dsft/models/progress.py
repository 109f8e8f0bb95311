"""What libraries say of themselves, kept out of the terminal while dsft writes a model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within this block transformers draws no bars; afterwards it does as it did before.

    Saving a model makes accelerate import DeepSpeed, whose notice of the accelerator that it found goes too.
    """
    from transformers.utils import logging as bars

    notices = logging.getLogger("DeepSpeed")
    notices.addFilter(_is_error)
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        notices.removeFilter(_is_error)
        if shown:
            bars.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
