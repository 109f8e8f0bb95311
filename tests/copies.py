"""The process that is copied for starts of dsft's commands (warm.py): it imports what they import, and forks for each.

The copy is made the child of who asked for it, by way of a process that ends at once: an orphan goes to the nearest
ancestor that is a subreaper (prctl), which who asks is for that moment.
"""

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import pickle
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks import plants

_TORCH = ("torch", "hydra", "omegaconf")
_LIBRARIES = (*_TORCH, "transformers", "peft")
_DSFT = (
    "dsft.job", "dsft.run", "dsft.plan", "dsft.chat", "dsft.export", "dsft.engine.assemble", "dsft.engine.loop",
    "dsft.data.open", "dsft.data.local", "dsft.verify",
)  # fmt: skip
PRELOADED = {"torch": _TORCH, "libraries": _LIBRARIES, "dsft": (*_LIBRARIES, *_DSFT)}
"""What the process has imported, by the name of how much it is."""
CUT = 2**20
"""Bytes of a message at most: arguments and environment of one start."""
SUBREAPER, PARENT_DIES = 36, 1
"""PR_SET_CHILD_SUBREAPER and PR_SET_PDEATHSIG of linux/prctl.h."""
LIBC = ctypes.CDLL(None)
_installed: list[str] = []
"""What is on sys.path, without the folder that it began in."""


class Start(NamedTuple):
    """What is started. before: called in the new process first, as Popen's preexec_fn; session: of its own."""

    module: str
    words: list[str]
    env: dict[str, str]
    cwd: str
    before: Callable[[], None] | None
    session: bool


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two ends of a socket that carries whole messages."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CUT)
    return ends


def _serve(ours: socket.socket) -> tuple[int, Start, list[int], int] | None:
    """Copy this process for each start that is asked for. Returns, in the copy, who asked for what, its streams, and
    where it says that it is what was asked for; None in this process at its end.
    """
    while True:
        message, streams, _, _ = socket.recv_fds(ours, CUT, 3)
        if not message:
            return None
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            if os.fork() > 0:
                os._exit(0)
            os.close(told)
            ours.close()
            return *pickle.loads(message), streams, tell
        for number in (tell, *streams):
            os.close(number)
        os.waitpid(between, 0)  # from here on the copy is the child of who asked
        ours.send(os.read(told, 64) or b"0")
        os.close(told)


def _become(parent: int, start: Start, streams: Sequence[int], tell: int) -> None:
    """Make this process what a fresh interpreter would be at its first line, and say so."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if start.session:
        os.setsid()
    until = time.monotonic() + 10.0
    while os.getppid() != parent:
        if time.monotonic() > until:
            os._exit(1)  # it died meanwhile
        os.sched_yield()
    if start.before is not None:
        start.before()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(start.env)
    os.chdir(start.cwd)
    here = [] if start.module.startswith("dsft.") else [start.cwd]  # dsft.first takes it away, as Python's -P does
    sys.path[:] = [*here, *_installed]
    sys.argv = [start.module, *start.words]
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    os.write(tell, str(os.getpid()).encode())
    os.close(tell)


def _live(ours: socket.socket) -> tuple[Start, socket.socket]:
    """Be copied, until there is nobody who could ask. Returns in a copy: what it has become, and from where it is to be
    copied itself.

    A copy first leaves another beside it, from which what it starts is copied: one that has run nothing yet, with one
    thread, in the same namespaces.
    """
    while True:
        asked = _serve(ours)
        if asked is None:
            os._exit(0)
        _become(*asked)
        near, far = pair()
        if os.fork() > 0:
            break
        LIBC.prctl(PARENT_DIES, signal.SIGKILL)
        near.close()
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.close(null)
        ours = far
    far.close()
    return asked[1], near


def _import(names: Sequence[str]) -> None:
    """Import as a start does: bitsandbytes without its compiler, no remarks. Where dsft is none of the names, it is not
    there afterwards: what its own import sets is set in the copy.
    """
    from dsft.imports import keep_remarks, uncompiled

    keep_remarks()
    with uncompiled():
        for name in names:
            importlib.import_module(name)
    if not any(name.startswith("dsft.") for name in names):
        for name in [name for name in sys.modules if name.partition(".")[0] == "dsft"]:
            del sys.modules[name]
    gc.freeze()  # so that a collection in a copy does not write to all its pages


def main() -> None:
    """copies.py FD KEY: the socket of the process that asks, and the JSON of a warm.Key."""
    from tests import warm  # which asks, in a copy as well

    _installed[:] = sys.path[1:]
    ours, key = socket.socket(fileno=int(sys.argv[1])), tuple(json.loads(sys.argv[2]))
    _import(PRELOADED[key[0]])
    start, near = _live(ours)
    warm.inherit(key, near)
    if plants.PLANTS in os.environ:
        plants.arm()
    sys.modules.pop(start.module, None)  # it runs once more, as __main__
    runpy.run_module(start.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from tests import copies  # known by its name, as pickle needs it, when __main__ is another

    copies.main()
