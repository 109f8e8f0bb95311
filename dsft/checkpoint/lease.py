"""One writer per run folder: a token that rises with every start, as a file that only one process can create.

A writer that sleeps through another's start (SIGSTOP, a lost node that comes back) finds a higher token and must not
write. What it was about to commit is gone by then: the newer writer clears unfinished folders after taking its token,
so a check before the rename leaves no gap between check and rename.

A lease file also says which process holds it and which start that process belongs to, so that a second start finds out
whether the first one still lives.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from dsft_launchers.files import replace_text

from dsft.checkpoint.holders import START as START
from dsft.checkpoint.holders import Record, is_same, line_of, lives, record_of
from dsft.checkpoint.holders import start_of as start_of

PREFIX = "lease-"
BEAT_S = 15.0
"""How often a holder touches its file, for those on other hosts."""
WRITTEN_S = 1.0
"""A lease file is created first and then written: for so long an empty one may become a whole one."""


class LeaseLostError(RuntimeError):
    """Another process writes this run's folder now, or the folder is gone."""


class HeldError(ValueError):
    """The process of another start works on the run."""


@dataclass(frozen=True)
class Holder:
    """The process that a lease names. line: which one and since when; alive: whether it still runs."""

    line: str
    alive: bool


@dataclass(frozen=True)
class Lease:
    """The right to write into the run of folder (its checkpoints), until a higher token is there.

    record: what the token's file says of this process.
    """

    folder: Path
    token: int
    record: Record

    def check(self, *, strict: bool = False) -> None:
        """Raise LeaseLostError if a newer writer has taken the run over, or if the run's folder is gone.

        A folder that cannot be read just now (a flaky network disk) says nothing, or raises OSError if strict. If
        checkpoints/ alone is gone it is made again.
        """
        try:
            newest = _newest(self.folder)
            if newest < self.token:
                newest = self._made_again(newest)
        except FileNotFoundError:
            newest = self._without_folder(strict=strict)
        except OSError:
            if strict:
                raise
            return
        if newest != self.token:
            holder = line_of(_read(self.folder, newest))
            raise LeaseLostError(f"{self.folder.parent} was taken over by {holder}; this process writes no more")

    def _without_folder(self, *, strict: bool) -> int:
        """Return the newest token once checkpoints/ is there again. Raises LeaseLostError if all of the run is gone."""
        run_dir = self.folder.parent
        try:
            if not run_dir.exists() and run_dir.parent.is_dir():
                raise LeaseLostError(f"{run_dir} is gone: it was removed or renamed; this process writes no more")
            self.folder.mkdir(exist_ok=True)
            return self._made_again(0)
        except OSError:
            if strict:
                raise
            return self.token

    def _made_again(self, newest: int) -> int:
        """Create the token's file anew if no other start has begun here since it was removed; the newest token then."""
        if newest and _read(self.folder, newest).get("start") != self.record["start"]:
            return newest
        _create(self.folder, self.token, self.record)
        return _newest(self.folder)

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Show other hosts that this process lives, inside; afterwards say that it holds nothing any more."""
        over = Event()

        def beat() -> None:
            while not over.wait(BEAT_S):
                with contextlib.suppress(OSError):
                    os.utime(_path(self.folder, self.token))

        thread = Thread(target=beat, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            self.release()

    def release(self) -> None:
        """Say in the token's file that its process holds the run no more. Never raises: at worst others wait."""
        path = _path(self.folder, self.token)
        with contextlib.suppress(OSError):
            if path.exists():
                replace_text(path, json.dumps({**self.record, "released": time.time()}))


def claim(folder: Path, environ: Mapping[str, str], *, takeover: bool = False) -> Lease:
    """Take the run of folder for the start of this process. Raises HeldError if another start's process holds it.

    takeover: take it all the same.
    """
    return _take(folder, environ, claims=True, takeover=takeover)[0]


def acquire(folder: Path, environ: Mapping[str, str] = os.environ) -> tuple[Lease, str | None]:
    """Take over the run of folder as its writer: the lease, and who wrote it before this start, if anybody did.

    Raises HeldError if another start's process holds it.
    """
    return _take(folder, environ, claims=False, takeover=False)


def refuse_living(folder: Path, environ: Mapping[str, str]) -> None:
    """Raise HeldError if another start's process holds the run of folder."""
    if folder.is_dir():
        _refuse(folder, environ, _newest(folder))


def holder(run_dir: Path) -> Holder | None:
    """Return who holds a run or held it last; None if nobody ever did, or that cannot be read."""
    folder = run_dir / "checkpoints"
    try:
        newest = _newest(folder)
        if not newest:
            return None
        living = _living(folder, newest)
    except OSError:
        return None
    return Holder(line_of(_read(folder, newest) if living is None else living), living is not None)


def _take(folder: Path, environ: Mapping[str, str], *, claims: bool, takeover: bool) -> tuple[Lease, str | None]:
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        before = _newest(folder)
        if not takeover:
            _refuse(folder, environ, before)
        earlier = _read(folder, before) if before else {}
        follows = earlier.get("claims") and is_same(earlier, environ)
        after = earlier.get("after") if follows else line_of(earlier) if before else None
        record = record_of(environ, claims=claims, after=after)
        if _create(folder, before + 1, record):
            break
    for old in _tokens(folder):
        if old < before:
            _path(folder, old).unlink(missing_ok=True)
    return Lease(folder, before + 1, record), after


def _create(folder: Path, token: int, record: Record) -> bool:
    """Return True if this process is the one that created the token's file."""
    try:
        descriptor = os.open(_path(folder, token), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        json.dump(record, file)
    return True


def _refuse(folder: Path, environ: Mapping[str, str], newest: int) -> None:
    if not newest:
        return
    living = _living(folder, newest)
    if living is not None and not is_same(living, environ):
        raise HeldError(
            f"run_dir must be free while another start works on it, got {folder.parent}: {line_of(living)}, holds it; "
            "wait for its end, stop it, or take the run over by resume.takeover=true"
        )


def _living(folder: Path, newest: int) -> Record | None:
    """Return the record of a living process of the start that holds the newest token; None if all are gone."""
    held = _read(folder, newest)
    if "released" in held:
        return None
    for token in sorted(_tokens(folder), reverse=True):
        record = held if token == newest else _read(folder, token)
        ours = token == newest or record.get("start", "") == held.get("start")  # of an older dsft: the newest alone
        if ours and lives(_path(folder, token), record):
            return record
    return None


def _read(folder: Path, token: int) -> Record:
    """Return the content of a token's file."""
    until = time.monotonic() + WRITTEN_S
    while True:
        try:
            record = json.loads(_path(folder, token).read_text(encoding="ascii"))
            return record if isinstance(record, dict) else {}
        except ValueError:
            if time.monotonic() > until:
                return {}
            time.sleep(WRITTEN_S / 20)
        except OSError:
            return {}


def _newest(folder: Path) -> int:
    return max(_tokens(folder), default=0)


def _tokens(folder: Path) -> list[int]:
    names = (name.removeprefix(PREFIX) for name in os.listdir(folder) if name.startswith(PREFIX))
    return [int(name) for name in names if name.isdigit()]


def _path(folder: Path, token: int) -> Path:
    return folder / f"{PREFIX}{token:06d}"
