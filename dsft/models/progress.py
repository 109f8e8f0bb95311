"""What libraries say of themselves, kept out of the terminal while dsft reads or writes a model."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

TALKATIVE = ("DeepSpeed", "torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")
"""Loggers of what accelerate and PEFT import by the way: of accelerators that were found, of kernels that were not."""


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within this block transformers draws no bars; afterwards it does as it did before.

    What TALKATIVE say short of an error goes too.
    """
    from transformers.utils import logging as bars

    notices = [logging.getLogger(name) for name in TALKATIVE]
    for notice in notices:
        notice.addFilter(_is_error)
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        for notice in notices:
            notice.removeFilter(_is_error)
        if shown:
            bars.enable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def quiet() -> None:
    """Keep progress bars of libraries out of the user's terminal and logs, in this process and those that it starts."""
    from transformers.utils import logging as bars

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bars.disable_progress_bar()
