"""Starts of dsft's commands from a process that has imported what they import.

A start spends most of its CPU time on importing torch and transformers, in the command, in each rank and in the process
that reads the result back. Here one process imports them once, and a copy of it (fork) becomes what is started: a child
of the process that starts it, with its own arguments, environment, folder and streams, which ends as an interpreter
ends. Whatever starts `python -m dsft.X` gets one, ranks by their launcher too; tests that are about the start itself
use fresh interpreters (`fresh`).
"""

import atexit
import ctypes
import faulthandler
import gc
import inspect
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.plants import PLANTS

PRELOADED = (
    "torch", "transformers", "peft", "hydra", "omegaconf", "dsft.job", "dsft.run", "dsft.plan", "dsft.chat",
    "dsft.export", "dsft.engine.assemble", "dsft.engine.loop", "dsft.data.open", "dsft.data.local", "dsft.verify",
)  # fmt: skip
STARTED = ("dsft.", "benchmarks.", "tests.distributed.")
"""Beginnings of modules that are started so."""
AT_IMPORT = (
    "PYTHONPATH", "PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
)  # fmt: skip
"""Variables that count when modules are imported, or when an interpreter begins: for each of their values another
process is copied.
"""
CUT = 2**20
"""Bytes of a message at most: arguments and environment of one start."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h

_LIBC = ctypes.CDLL(None)
_fork_exec: Callable[..., None] = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_arguments = inspect.signature(_fork_exec)
_key: tuple[str | None, ...] | None = None
"""In a process that is such a copy: values of AT_IMPORT at its import. None: any, each gets a process of its own."""
_installed: list[str] = []
"""What is on sys.path there, without the folder that it began in."""
_sources: "dict[tuple[str | None, ...], _Source]" = {}
_asked: Counter[tuple[str | None, ...]] = Counter()
"""How often a start under these values was asked for before it had a source."""
_asking = threading.Lock()
_fresh = False


class Start(NamedTuple):
    """What is started. before: called in the new process first, as Popen's preexec_fn; session: of its own."""

    module: str
    words: list[str]
    env: dict[str, str]
    cwd: str
    before: Callable[[], None] | None
    session: bool


def run(
    module: str, *words: str | Path, typed: str = "", prefix: Sequence[str] = ()
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m module words` to its end, in this environment. typed: on its standard input. prefix: of the
    command that starts the process which is copied, as setpriv and its options.
    """
    command = [*prefix, sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(command, input=typed, capture_output=True, text=True, check=False)


@contextmanager
def fresh() -> Iterator[None]:
    """While inside, this process starts interpreters that import what they need, and so do they."""
    global _fresh
    before, _fresh = _fresh, True
    try:
        yield
    finally:
        _fresh = before


def install() -> None:
    """From now on, what this process starts of STARTED is a copy."""
    subprocess.Popen._execute_child = _execute_child  # type: ignore[attr-defined]


def _execute_child(process: "subprocess.Popen[Any]", *given: Any, **named: Any) -> None:
    """Popen's own, whose arguments it takes, but for a start that a copy can be."""
    asked = _arguments.bind(process, *given, **named).arguments
    found = None if _fresh else _understood(asked)
    if found is None:
        _fork_exec(process, *given, **named)
        return
    prefix, start = found
    key = (*prefix, *map(start.env.get, AT_IMPORT))
    if key not in _sources and _key is None and _asked[key] < (1 if _sources else 0):
        _asked[key] += 1  # a second start of the kind may never come, and a source imports more than most starts need
        _fork_exec(process, *given, **named)
        return
    streams = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
    with _asking:
        if key not in _sources or not _sources[key].lives():
            _sources[key] = _Source.imported(prefix, start.env)
        pid = _sources[key].start(start, [number if fd == -1 else fd for number, fd in enumerate(streams)])
    process.pid = pid
    process._child_created = True  # type: ignore[attr-defined]
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    process._close_pipe_fds(*(asked[name] for name in pipes))  # type: ignore[attr-defined]


def _understood(asked: Mapping[str, Any]) -> tuple[tuple[str, ...], Start] | None:
    """The command before the interpreter, and the start; None for what a copy cannot be."""
    command = asked["args"]
    plain = not (asked["shell"] or asked["executable"] or asked["pass_fds"]) and asked["process_group"] == -1
    owners = [asked[name] for name in ("gid", "gids", "uid")]
    if not plain or isinstance(command, (str, bytes, os.PathLike)) or any(owner is not None for owner in owners):
        return None
    words = [os.fsdecode(word) for word in command]
    at = words.index(sys.executable) if sys.executable in words else len(words)
    safe = words[at + 1 : at + 2] == ["-P"]
    del words[at + 1 : at + 1 + safe]
    known = words[at + 1 : at + 2] == ["-m"] and words[at + 2].startswith(STARTED)
    if not known or (at > 0 and words[0] != "setpriv"):
        return None
    env = dict(os.environ if asked["env"] is None else asked["env"])
    if PLANTS in env:
        return None  # a fault is planted while a module is imported, before another has taken a function from it
    if _key is not None and (at > 0 or tuple(map(env.get, AT_IMPORT)) != _key):
        return None  # this process has one source only: itself, as it was when it began
    try:
        pickle.dumps(asked["preexec_fn"])
        for number in range(3):
            os.fstat(number)
        cwd = os.fsdecode(asked["cwd"] or os.getcwd())
    except (pickle.PicklingError, AttributeError, OSError):
        return None
    start = Start(words[at + 2], words[at + 3 :], env, cwd, asked["preexec_fn"], asked["start_new_session"])
    return tuple(words[:at]), start


class _Source:
    """The process that is copied, from where copies are asked for."""

    def __init__(self, ours: socket.socket, process: "subprocess.Popen[bytes] | None" = None) -> None:
        self.socket = ours
        self.process = process

    @classmethod
    def imported(cls, prefix: Sequence[str], env: Mapping[str, str]) -> "_Source":
        """A new one, that imports under env. prefix: of its command."""
        ours, theirs = _pair()
        command = [*prefix, sys.executable, "-m", "tests.warm", str(theirs.fileno())]
        others = {name: value for name, value in os.environ.items() if name not in AT_IMPORT}
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env=others | {name: env[name] for name in AT_IMPORT if name in env},
        )  # fmt: skip
        theirs.close()
        source = cls(ours, process)
        atexit.register(source.close)
        return source

    def lives(self) -> bool:
        """Whether it can be asked."""
        return self.process is None or self.process.poll() is None

    def start(self, start: Start, streams: Sequence[int]) -> int:
        """Return the process id of a copy, which is this process' child: it is given to the nearest subreaper."""
        _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
        try:
            socket.send_fds(self.socket, [pickle.dumps((os.getpid(), start))], streams)
            answer = self.socket.recv(64)
        finally:
            _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0)
        assert answer, "the process that is copied has died"
        if answer == b"0":
            raise subprocess.SubprocessError(f"{start.module} could not be started")
        return int(answer)

    def close(self) -> None:
        """End it: it leaves when its socket is closed."""
        self.socket.close()
        if self.process is not None:
            self.process.wait()


def _pair() -> tuple[socket.socket, socket.socket]:
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


def _live(ours: socket.socket) -> Start:
    """Be copied, until there is nobody who could ask. Returns in a copy, with what it has become.

    A copy first leaves another beside it, from which what it starts is copied: one that has run nothing yet, with one
    thread, in the same namespaces.
    """
    while True:
        asked = _serve(ours)
        if asked is None:
            os._exit(0)
        _become(*asked)
        near, far = _pair()
        if os.fork() > 0:
            break
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        near.close()
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.close(null)
        ours = far
    far.close()
    _sources.clear()
    assert _key is not None
    _sources[_key] = _Source(near)
    return asked[1]


def _import() -> None:
    """Import as a start does: bitsandbytes without its compiler, no remarks."""
    import importlib

    from dsft.imports import keep_remarks, uncompiled

    keep_remarks()
    with uncompiled():
        for name in PRELOADED:
            importlib.import_module(name)
    gc.freeze()  # so that a collection in a copy does not write to all its pages


def main() -> None:
    """warm.py FD: the socket of the process that asks."""
    global _key
    _installed[:] = sys.path[1:]
    _key = tuple(map(os.environ.get, AT_IMPORT))
    ours = socket.socket(fileno=int(sys.argv[1]))
    _import()
    install()
    module = _live(ours).module
    sys.modules.pop(module, None)  # it runs once more, as __main__
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from tests import warm  # known by its name, as pickle needs it, when __main__ is another

    warm.main()
