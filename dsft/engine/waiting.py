"""Tells a rank that waits for the others from one that hangs by itself, by where its threads stand."""

import sys
import threading
from threading import Thread
from types import FrameType

COLLECTIVES = ("/torch/distributed/", "/deepspeed/", "/dsft/comm/", "/dsft/strategies/")
"""Parts of the paths of the files from which a process waits for its peers; waiting itself is a call into C."""
PASSED_OVER = ("/threading.py", "/contextlib.py", "/torch/")
"""Parts of the paths of files that only carry a wait, as torch's dispatcher does: who called them decides."""
BACKWARD = "/torch/autograd/graph.py"
"""Backward passes of an accelerator run hooks, and the collectives in them, on other threads than the caller's."""
SAVING = "/dsft/checkpoint/saver.py"
"""Here the main thread waits for the thread that saves, whose name begins with SAVER."""
SAVER = "save-"
COMPUTING = ("/torch/", "/dsft/", "/transformers/")


def waits(thread: Thread, *, accelerated: bool) -> bool:
    """Return True if thread stands in a collective, or waits for a thread that does.

    accelerated: its collectives run on an accelerator; then it waits wherever it looks at a result, so that any place
    inside of torch, transformers or dsft counts.
    """
    file = _place(thread)
    if file is None:
        return False
    if file.endswith(SAVING):
        savers = [other for other in threading.enumerate() if other.name.startswith(SAVER)]
        return all(waits(saver, accelerated=accelerated) for saver in savers)
    if file.endswith(BACKWARD) and any(_collective(_place(other)) for other in threading.enumerate()):
        return True
    return _collective(file) or (accelerated and any(part in file for part in COMPUTING))


def _collective(file: str | None) -> bool:
    return file is not None and any(part in file for part in COLLECTIVES)


def _place(thread: Thread) -> str | None:
    """Return the file of the innermost frame that is not passed over; None for a thread that has ended."""
    frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
    while frame is not None and _is_passed_over(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else frame.f_code.co_filename


def _is_passed_over(file: str) -> bool:
    return any(part in file for part in PASSED_OVER) and not (_collective(file) or file.endswith(BACKWARD))
