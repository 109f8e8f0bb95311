"""One rank as a process: how it is started, tied to the launcher, signalled and heard."""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import IO

from dsft_launchers.place import MEETING

TAIL_BYTES = 65536
HELD_S = 2.0
"""How long a terminal that takes nothing (Ctrl-S, a pager) is waited for; what it misses is in the log."""

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Rank:
    """One process of the launch. code: None while it runs; at: when its end was seen.

    written: its log, open, so that it can be read when someone has removed it.
    """

    index: int
    process: subprocess.Popen[bytes]
    log: Path
    written: IO[bytes]
    log_start: int
    code: int | None = None
    at: float = 0.0

    def poll(self) -> bool:
        """Return whether it still runs."""
        if self.code is None:
            self.code = self.process.poll()
            self.at = time.monotonic()
        return self.code is None

    def send(self, number: int) -> None:
        """Signal the process itself."""
        if self.poll():
            self.process.send_signal(number)

    def send_group(self, number: int) -> None:
        """Signal the process and its children; not once it was reaped, since its group id may be another's by then."""
        if self.poll():
            os.killpg(self.process.pid, number)

    def text(self) -> str:
        """The end of what it wrote in this launch; empty if the disk does not give it any more."""
        with suppress(OSError):
            size = self.written.seek(0, os.SEEK_END)
            self.written.seek(max(self.log_start, size - TAIL_BYTES))
            return self.written.read().decode(errors="replace")
        return ""


def defaults(num_processes: int) -> dict[str, str]:
    """Variables that the ranks get unless the user has set them."""
    values = {
        "PYTHONUNBUFFERED": "1",  # live output, and whole logs after kill -9
        "PYTHONFAULTHANDLER": "1",  # a stack in the log after a crash in native code
        "GLOO_SOCKET_IFNAME": "lo",  # gloo resolves the hostname otherwise, which fails on many laptops
        "NCCL_SOCKET_IFNAME": "lo",  # what it exchanges at its start, on an outer interface otherwise
    }
    if num_processes > 1:
        values["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // num_processes))
    return {name: value for name, value in values.items() if name not in os.environ}


def rank_env(index: int, num_processes: int, place: Path) -> dict[str, str]:
    """Variables by which rank index finds the others: torchrun's, with a private folder in place of an address."""
    return {
        "RANK": str(index),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_RANK": str(index),
        "LOCAL_WORLD_SIZE": str(num_processes),
        MEETING: str(place),
    }


def start(command: Sequence[str], index: int, log_dir: Path, env: Mapping[str, str]) -> Rank:
    """Start rank index with exactly env; rank 0 writes into pipes, the others into their logs."""
    log = log_dir / f"rank-{index}.log"
    with log.open("ab") as file:
        written = log.open("rb", buffering=0)
        process = subprocess.Popen(
            list(command),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if index == 0 else file,
            stderr=subprocess.PIPE if index == 0 else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(_tie_to, os.getpid()),
        )
        return Rank(index=index, process=process, log=log, written=written, log_start=file.tell())


def _tie_to(launcher: int) -> None:
    """Run by a new process before it becomes the rank: die with the launcher, and listen to SIGINT."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job starts with SIGINT ignored


def pass_through(rank: Rank) -> list[Thread]:
    """Copy the rank's stdout and stderr to its log and, live, to this process' own."""
    sys.stdout.flush()
    sys.stderr.flush()
    assert rank.process.stdout is not None
    assert rank.process.stderr is not None
    streams = ((rank.process.stdout, 1), (rank.process.stderr, 2))
    threads = [Thread(target=_tee, args=(source, rank.log, terminal), daemon=True) for source, terminal in streams]
    for thread in threads:
        thread.start()
    return threads


def _tee(source: IO[bytes], log: Path, terminal: int) -> None:
    """Copy as it comes to the terminal; by whole lines to the log, where two streams meet."""
    pending = b""
    with source, log.open("ab", buffering=0) as file:
        while chunk := os.read(source.fileno(), TAIL_BYTES):
            whole, end, pending = (pending + chunk).rpartition(b"\n")
            with suppress(OSError):  # the disk is full: the rank must not wait for it, nor die of it
                file.write(whole + end)
            try:
                while chunk and select.select([], [terminal], [], HELD_S)[1]:  # not shown: the rank must not wait
                    chunk = chunk[os.write(terminal, chunk[: select.PIPE_BUF]) :]
            except OSError:  # the terminal is gone; the log goes on
                continue
        with suppress(OSError):
            file.write(pending)
