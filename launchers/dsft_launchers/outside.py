"""A process beside a rank that ends it once its interpreter no longer runs.

A thread that holds the GIL in C, as one that spins in an NCCL kernel would, stops all threads of its rank, the one that
watches over it included; a rank that is stopped by SIGSTOP runs none either. The rank says through a pipe about once a
second how long it may be silent from now. Linux only; stands alone, because the watcher runs this file as a script.
"""

import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

POLL_S = 0.25
KILL_AFTER_S = 3.0
"""Between SIGABRT, at which a rank's faulthandler writes its stacks without the interpreter, and SIGKILL."""
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that reach a whole process group or a SLURM step, and that are meant for the rank."""


class Outside:
    """The watcher of this process. It never outlives it, and does nothing before the first beat."""

    def __init__(self) -> None:
        from dsft_launchers.verdict import HANGS

        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # inherited, so that none comes before it ignores them
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(os.getpid()), HANGS],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self.process.stdin is not None
        self.pipe = self.process.stdin.fileno()
        os.set_blocking(self.pipe, False)

    def beat(self, seconds: float, words: str) -> None:
        """Allow so many seconds of silence from now on. words: the phase that the rank is in. Never blocks or raises.

        A beat is lost where the watcher is stopped and its pipe full; it does not count that time.
        """
        with suppress(OSError):
            os.write(self.pipe, f"{seconds:.3f} {' '.join(words.split())}\n".encode()[: select.PIPE_BUF])

    def close(self) -> None:
        """End the watcher, and wait for its end."""
        assert self.process.stdin is not None
        self.pipe = -1
        self.process.stdin.close()
        self.process.kill()  # a forked child of the rank may still hold the pipe open
        self.process.wait()


def watch(rank: int, word: str) -> None:
    """Read beats from stdin until the rank is gone or the pipe closed; end the rank once it is silent for too long."""
    allowed, words, silent, looked = math.inf, "", 0.0, time.monotonic()
    while _lives(rank):
        heard = select.select([0], [], [], POLL_S)[0]
        now = time.monotonic()
        silent += min(now - looked, POLL_S)  # it took longer: this process was stopped too, as by SLURM's suspend
        looked = now
        if heard:
            text = os.read(0, 1 << 20).decode(errors="replace")
            if not text:
                return
            if newest := _newest(text):
                allowed, words, silent = float(newest[0]), newest[1], 0.0
        elif silent > allowed:
            _end(rank, f"{word}{words}: its interpreter has not run for {silent:.0f} s")
            return


def _newest(text: str) -> Sequence[str]:
    """The seconds and the words of the last whole line; empty if there is none."""
    whole = text.rpartition("\n")[0].rpartition("\n")[2]
    seconds, space, words = whole.partition(" ")
    return (seconds, words) if space else ()


def _lives(rank: int) -> bool:
    """Whether the rank, which started this process, still runs."""
    return os.getppid() == rank


def _end(rank: int, said: str) -> None:
    """Say why, then SIGABRT, then SIGKILL; to the rank alone, as its number is not another's while it is the parent."""
    with suppress(OSError):
        os.write(2, f"{said}\n".encode())
    for number, wait_s in ((signal.SIGABRT, KILL_AFTER_S), (signal.SIGKILL, 0.0)):
        if _lives(rank):
            with suppress(ProcessLookupError):
                os.kill(rank, number)
        until = time.monotonic() + wait_s
        while _lives(rank) and time.monotonic() < until:
            time.sleep(0.02)


if __name__ == "__main__":
    for ignored in IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    watch(int(sys.argv[1]), sys.argv[2])
