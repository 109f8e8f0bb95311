"""Finds and ends what a launch left behind: children of ranks, also when the launcher itself was killed.

Every process of a launch inherits MARK in its environment, whatever session or group it moves to. A watcher process
waits for the launcher's end of a pipe to close, so it acts even after kill -9 of the launcher. Linux only; stands
alone, because the watcher runs this file as a script.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

MARK = "DSFT_LAUNCH"


def new_mark(env: Mapping[str, str]) -> str:
    """Value of MARK for a new launch; it carries the mark of the launch that env belongs to, if any."""
    return "/".join(filter(None, (env.get(MARK), secrets.token_hex(8))))


def members(mark: str) -> list[int]:
    """Process ids of the living processes that carry mark."""
    entry = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_bytes()  # empty for a zombie
        except OSError:
            continue
        if entry in environ:
            found.append(int(folder.name))
    return found


def end(mark: str, *, patience_s: float) -> list[int]:
    """Give processes that carry mark patience_s to leave by themselves, then SIGKILL them. Returns who was killed."""
    start = time.monotonic()
    killed: list[int] = []
    while left := members(mark):
        waited = time.monotonic() - start - patience_s
        if waited > 5.0:  # a process in uninterruptible sleep cannot be waited for
            break
        if waited >= 0:
            for pid in left:
                _kill(pid)
            killed += [pid for pid in left if pid not in killed]
        time.sleep(0.02)
    return killed


@contextmanager
def watched(mark: str, folder: Path) -> Iterator[None]:
    """While inside, a watcher process ends the processes of mark should this process die, and removes folder."""
    env = {name: value for name, value in os.environ.items() if name != MARK}
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, mark, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=env,
        start_new_session=True,
    )
    assert watcher.stdin is not None
    try:
        yield
    finally:
        watcher.stdin.close()
        watcher.wait()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.stdin.buffer.read()  # returns when the launcher is gone, or done
    end(sys.argv[1], patience_s=0.0)
    import shutil  # here, as it costs a launch more than the rest of this process

    shutil.rmtree(sys.argv[2], ignore_errors=True)
