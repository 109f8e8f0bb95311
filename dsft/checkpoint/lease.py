"""One writer per run folder: a token that rises with every start, as a file that only one process can create.

A writer that sleeps through another's start (SIGSTOP, a lost node that comes back) finds a higher token and must not
write. What it was about to commit is gone by then: the newer writer clears unfinished folders after taking its token,
so a check before the rename leaves no gap between check and rename.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

PREFIX = "lease-"


class LeaseLostError(RuntimeError):
    """Another process writes this run's folder now."""


@dataclass(frozen=True)
class Lease:
    """The right to write checkpoints into folder, until a higher token is there."""

    folder: Path
    token: int

    def check(self, *, strict: bool = False) -> None:
        """Raise LeaseLostError if a newer writer has taken the folder over.

        A folder that cannot be read just now (a flaky network disk) says nothing, or raises OSError if strict.
        """
        try:
            newest = _newest(self.folder)
        except OSError:
            if strict:
                raise
            return
        if newest > self.token:
            raise LeaseLostError(
                f"{self.folder.parent} was taken over by {_holder(self.folder, newest)}; this process writes no more"
            )


def acquire(folder: Path) -> tuple[Lease, str | None]:
    """Take the folder over: the lease, and who held it before (a line), if anybody did."""
    folder.mkdir(parents=True, exist_ok=True)
    before = _newest(folder)
    token = before + 1
    while not _create(folder, token):
        token += 1
    for old in _tokens(folder):
        if old < before:
            _path(folder, old).unlink(missing_ok=True)
    return Lease(folder, token), _holder(folder, before) if before else None


def _create(folder: Path, token: int) -> bool:
    """True if this process is the one that created the token's file."""
    try:
        descriptor = os.open(_path(folder, token), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}, file)
    return True


def _holder(folder: Path, token: int) -> str:
    try:
        who = json.loads(_path(folder, token).read_text(encoding="ascii"))
        return f"process {who['pid']} on {who['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def _newest(folder: Path) -> int:
    return max(_tokens(folder), default=0)


def _tokens(folder: Path) -> list[int]:
    return [int(name.removeprefix(PREFIX)) for name in os.listdir(folder) if name.startswith(PREFIX)]


def _path(folder: Path, token: int) -> Path:
    return folder / f"{PREFIX}{token:06d}"
