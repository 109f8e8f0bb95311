"""Kills a piece of work by SIGKILL before and after each of its system calls, each time on a fresh copy of a folder."""

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def kill_at_each_call(base: Path, cases: Path, calls: Sequence[str], work: Callable[[Path], object]) -> None:
    """Copy base to cases/N-before and cases/N-after, and kill work(copy) there at its N-th call; until it survives.

    calls: names of functions of os, and copyfile of shutil. Call it in a process of its own: it forks.
    """
    nth, killed = 1, True
    while killed:
        for after in (False, True):
            folder = cases / f"{nth}-{'after' if after else 'before'}"
            shutil.copytree(base, folder)
            child = os.fork()
            if child == 0:
                _plant(calls, nth, after)
                work(folder)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            killed = os.WIFSIGNALED(status)
            assert killed or status == 0, status
        nth += 1


def _plant(calls: Sequence[str], nth: int, after: bool) -> None:
    count = 0

    def wrap(real: Any) -> Any:
        def call(*args: Any, **keys: Any) -> Any:
            nonlocal count
            count += 1
            at = count
            if at == nth and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **keys)
            finally:
                if at == nth:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in calls:
        module = os if hasattr(os, name) else shutil
        setattr(module, name, wrap(getattr(module, name)))
