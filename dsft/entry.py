"""How a process of ours begins and ends: quick imports, and no look through what the end throws away."""

import gc
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def enter(main: Callable[[], int]) -> NoReturn:
    """Exit with main's code. What imports make stays, and what is left at the end goes with the process.

    Looking through it is a quarter of the seconds that a refusal takes. Libraries that call torch.compile while they
    are imported (bitsandbytes does) would fetch its compiler: 2 of the 11 CPU seconds that a short run takes.
    """
    gc.disable()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    code = main()
    gc.freeze()
    sys.exit(code)


def collect_again() -> None:
    """Collect what the start left, and garbage from here on; what is alive by now is not looked through again."""
    gc.collect()
    gc.freeze()
    gc.enable()
