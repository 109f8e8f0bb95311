"""Starts of dsft's commands from a process that has imported what they import.

A start spends most of its CPU time on importing torch and transformers. Here one process imports them once and forks
for each start. The child is a process of its own: with its own arguments, environment, folder and streams, and it
ends as an interpreter ends. Tests of the start itself, of signals and of killed processes use fresh interpreters.
"""

import atexit
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PRELOADED = (
    "torch", "transformers", "peft", "hydra", "omegaconf", "dsft.job", "dsft.run", "dsft.plan", "dsft.chat",
    "dsft.export", "dsft.engine.assemble", "dsft.engine.loop", "dsft.data.open", "dsft.data.local", "dsft.verify",
)  # fmt: skip
AT_IMPORT = ("PYTHONPATH", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""Variables that count when modules are imported: for each of their values another process forks."""
CUT = 2**20
"""Bytes of a message at most: arguments and environment of one start."""

_servers: dict[tuple[str | None, ...], "_Server"] = {}


def run(
    module: str, *words: str | Path, typed: str = "", prefix: Sequence[str] = ()
) -> "subprocess.CompletedProcess[str]":
    """Run `python -m module words` to its end, in this environment. typed: on its standard input. prefix: of the
    command that starts the process which forks, as setpriv and its options.
    """
    key = (*prefix, *map(os.environ.get, AT_IMPORT))
    server = _servers.get(key)
    if server is None or server.process.poll() is not None:
        server = _servers[key] = _Server(prefix)
    return server.run(module, [str(word) for word in words], typed)


class _Server:
    """The process that forks, from here."""

    def __init__(self, prefix: Sequence[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CUT)
        command = [*prefix, sys.executable, "-m", "tests.warm", str(theirs.fileno())]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        theirs.close()
        self.socket = ours
        atexit.register(self.close)

    def run(self, module: str, words: list[str], typed: str) -> "subprocess.CompletedProcess[str]":
        """Ask for a start, and wait for its end."""
        with TemporaryDirectory() as folder:
            given, out, err = (Path(folder) / name for name in ("in", "out", "err"))
            given.write_text(typed)
            asked = {"module": module, "words": words, "env": dict(os.environ), "cwd": os.getcwd()}
            with given.open() as stdin, out.open("w") as stdout, err.open("w") as stderr:
                streams = [stdin.fileno(), stdout.fileno(), stderr.fileno()]
                socket.send_fds(self.socket, [json.dumps(asked).encode()], streams)
            answer = self.socket.recv(64)
            assert answer, "the process that forks has died"
            return subprocess.CompletedProcess([module, *words], int(answer), out.read_text(), err.read_text())

    def close(self) -> None:
        """End it: it leaves when its socket is closed."""
        self.socket.close()
        self.process.wait()


def _serve(ours: socket.socket) -> dict[str, Any] | None:
    """Fork for each start that is asked for; what was asked, in the child; None in the parent at its end."""
    while True:
        message, streams, _, _ = socket.recv_fds(ours, CUT, 3)
        if not message:
            return None
        pid = os.fork()
        if pid == 0:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            ours.close()
            asked: dict[str, Any] = json.loads(message)
            return asked
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(pid, 0)
        ours.send(str(os.waitstatus_to_exitcode(status)).encode())


def _import() -> None:
    """Import as a start does: bitsandbytes without its compiler, no remarks."""
    import importlib

    from dsft.imports import keep_remarks, uncompiled

    keep_remarks()
    with uncompiled():
        for name in PRELOADED:
            importlib.import_module(name)


def main() -> None:
    """warm.py FD: the socket of the test process."""
    ours = socket.socket(fileno=int(sys.argv[1]))
    _import()
    asked = _serve(ours)
    if asked is None:
        return
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.argv = [asked["module"], *asked["words"]]
    sys.modules.pop(asked["module"], None)  # it runs once more, as __main__
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
