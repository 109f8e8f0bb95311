"""python -m tests.unit.checkpoint.dying RUN WHAT N: starts or settles, and dies before the N-th change of a file."""

import os
import sys
from itertools import count
from pathlib import Path
from typing import Any

from dsft.checkpoint.store import Store

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "shutil.rmtree")
DIED = 9


def start(run_dir: Path) -> int:
    """The step from which a start goes on, where everything verifies (as dsft.checkpoint.restore does it)."""
    store = Store(run_dir)
    store.settle_trial()
    newest, *older = store.newest_first()
    if store.trials.reason(newest) and older:
        store.trials.begin(newest, older[0])
        newest = older[0]
    return int(newest.name.removeprefix("step-"))


def settle(run_dir: Path) -> None:
    Store(run_dir).settle_trial()


def die_at(nth: int) -> None:
    """From here on the process ends itself before its nth change of the file system."""
    calls = count(1)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in CHANGES) and next(calls) == nth:
            os._exit(DIED)

    sys.addaudithook(hook)


if __name__ == "__main__":
    die_at(int(sys.argv[3]))
    {"start": start, "settle": settle}[sys.argv[2]](Path(sys.argv[1]))
