"""How a process of ours begins and ends: the garbage collector stays out of its imports and of its end."""

import gc
import sys
from collections.abc import Callable
from typing import NoReturn


def enter(main: Callable[[], int]) -> NoReturn:
    """Exit with main's code. What imports make stays, and what is left at the end goes with the process.

    Looking through it is a quarter of the seconds that a refusal takes.
    """
    gc.disable()
    code = main()
    gc.freeze()
    sys.exit(code)


def collect_again() -> None:
    """Collect what the start left, and garbage from here on; what is alive by now is not looked through again."""
    gc.collect()
    gc.freeze()
    gc.enable()
