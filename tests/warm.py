"""Starts of dsft's commands from a process that has imported what they import.

A start spends most of its CPU time on importing torch and transformers, in the command, in each rank and in the process
that reads the result back. Here one process imports them once, and a copy of it (fork) becomes what is started: a child
of the process that starts it, with its own arguments, environment, folder and streams, which ends as an interpreter
ends. Whatever starts `python -m dsft.X` gets one, ranks by their launcher too; tests that are about the start itself
use fresh interpreters (`fresh`). A start with planted faults is copied from a process that has the libraries alone, as
plants are put where a module of dsft is imported; one whose Hugging Face variables are new from one that has torch.
"""

import atexit
import inspect
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.plants import PLANTS
from tests import copies

STARTED = ("dsft.", "benchmarks.", "tests.distributed.", "tests.launch.")
"""Beginnings of modules that are started so."""
AT_BEGIN = ("PYTHONPATH", "PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "OMP_NUM_THREADS")
"""Variables that count when an interpreter begins, or when torch is imported."""
AT_IMPORT = (
    *AT_BEGIN, "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HUB_ETAG_TIMEOUT",
    "HF_HUB_DOWNLOAD_TIMEOUT", "HF_TOKEN", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_DISABLE_PROGRESS_BARS",
    "TRANSFORMERS_OFFLINE",
)  # fmt: skip
"""Variables that count when the libraries are imported: for each of their values another process is copied."""
Key = tuple[str | None, ...]
"""Of a process that is copied: what it has imported (of copies.PRELOADED), its command's beginning, and its values of
the variables that count for that.
"""
_fork_exec: Callable[..., None] = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_arguments = inspect.signature(_fork_exec)
_key: Key | None = None
"""In a process that is such a copy: of what it was copied from. None: what it starts has a source by its own key."""
_sources: "dict[Key, _Source]" = {}
_asked: Counter[Key] = Counter()
"""How often a start was asked for before it had a source with all imports."""
_asking = threading.Lock()
_fresh = False


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


def key_of(imported: str, prefix: Sequence[str], env: Mapping[str, str]) -> Key:
    """The key of a process that has imported this, was started by prefix, and under env."""
    return (imported, *prefix, *map(env.get, AT_BEGIN if imported == "torch" else AT_IMPORT))


def inherit(key: Key, ours: socket.socket) -> None:
    """In a copy: what it starts and has this key is copied from the process at the other end of ours."""
    global _key
    _key = key
    _sources.clear()
    _sources[key] = _Source(ours)
    install()


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
    key = _key or _chosen(prefix, start.env)
    streams = [asked["p2cread"], asked["c2pwrite"], asked["errwrite"]]
    with _asking:
        if key not in _sources or not _sources[key].lives():
            _sources[key] = _Source.imported(key, prefix, start.env)
        pid = _sources[key].start(start, [number if fd == -1 else fd for number, fd in enumerate(streams)])
    process.pid = pid
    process._child_created = True  # type: ignore[attr-defined]
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    process._close_pipe_fds(*(asked[name] for name in pipes))  # type: ignore[attr-defined]


def _chosen(prefix: Sequence[str], env: Mapping[str, str]) -> Key:
    """The key of the process that is copied for a start under env: of one that has imported as much as it may."""
    if any(env.get(name) != os.environ.get(name) for name in AT_IMPORT if name not in AT_BEGIN):
        return key_of("torch", prefix, env)  # they belong to a test, and some are set before the libraries are imported
    if PLANTS in env:
        return key_of("libraries", prefix, env)
    whole = key_of("dsft", prefix, env)
    if whole in _sources or not _sources or _asked[whole] > 0:
        return whole
    _asked[whole] += 1  # a second start of the kind may never come, and a source imports more than most starts need
    return key_of("torch", prefix, env)


def _understood(asked: Mapping[str, Any]) -> tuple[tuple[str, ...], copies.Start] | None:
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
    env = dict(os.environ if asked["env"] is None else asked["env"])
    if not known or (at > 0 and words[0] != "setpriv") or env.get("PYTHONSAFEPATH"):
        return None
    if _key is not None and (key_of(str(_key[0]), words[:at], env) != _key or (PLANTS in env and _key[0] == "dsft")):
        return None  # this process has one source only: itself, as it was when it began
    try:
        pickle.dumps(asked["preexec_fn"])
        for number in range(3):
            os.fstat(number)
        cwd = os.fsdecode(asked["cwd"] or os.getcwd())
    except (pickle.PicklingError, AttributeError, OSError):
        return None
    start = copies.Start(words[at + 2], words[at + 3 :], env, cwd, asked["preexec_fn"], asked["start_new_session"])
    return tuple(words[:at]), start


class _Source:
    """The process that is copied, from where copies are asked for."""

    def __init__(self, ours: socket.socket, process: "subprocess.Popen[bytes] | None" = None) -> None:
        self.socket = ours
        self.process = process

    @classmethod
    def imported(cls, key: Key, prefix: Sequence[str], env: Mapping[str, str]) -> "_Source":
        """A new one, that imports under env what its key says. prefix: of its command."""
        ours, theirs = copies.pair()
        command = [*prefix, sys.executable, "-m", "tests.copies", str(theirs.fileno()), json.dumps(key)]
        others = {name: value for name, value in os.environ.items() if name not in (*AT_IMPORT, PLANTS)}
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

    def start(self, start: copies.Start, streams: Sequence[int]) -> int:
        """Return the process id of a copy, which is this process' child: it is given to the nearest subreaper."""
        copies.LIBC.prctl(copies.SUBREAPER, 1)
        try:
            socket.send_fds(self.socket, [pickle.dumps((os.getpid(), start))], streams)
            answer = self.socket.recv(64)
        finally:
            copies.LIBC.prctl(copies.SUBREAPER, 0)
        assert answer, "the process that is copied has died"
        if answer == b"0":
            raise subprocess.SubprocessError(f"{start.module} could not be started")
        return int(answer)

    def close(self) -> None:
        """End it: it leaves when its socket is closed."""
        self.socket.close()
        if self.process is not None:
            self.process.wait()
