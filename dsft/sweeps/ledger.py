"""SWEEP/sweep.json: what was typed for each point, and from where; written before any of them starts."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dsft_launchers.files import replace_text
from filelock import FileLock, Timeout

from dsft.likeness import holds_setup

NAME, LOCK = "sweep.json", ".lock"


@dataclass(frozen=True)
class Entry:
    """One point. words: its overrides, without run_dir; refused: why it could not be started when last tried."""

    words: list[str]
    refused: str | None


@dataclass
class Ledger:
    """metric: what the table is sorted by; cwd, config_dir: where the sweep was typed, and its --config-dir."""

    metric: str
    cwd: str
    config_dir: str | None
    points: list[Entry] = field(default_factory=list)

    def put(self, index: int, entry: Entry, *, keep: bool) -> None:
        """Enter a point. keep: an earlier entry stays."""
        while len(self.points) <= index:
            self.points.append(Entry([], "never typed"))
        if not (keep and self.points[index].words):
            self.points[index] = entry

    def write(self, sweep: Path) -> None:
        """Replace SWEEP/sweep.json at once; one that holds lines of launcher.setup is for its user alone."""
        private = any(holds_setup(word) for entry in self.points for word in entry.words)
        replace_text(sweep / NAME, json.dumps(asdict(self), indent=1) + "\n", 0o600 if private else 0o666)

    def changed(self, index: int) -> list[str]:
        """The words of a point that not all points share."""
        shared = set(self.points[0].words).intersection(*(entry.words for entry in self.points))
        return [word for word in self.points[index].words if word not in shared]


def begin(metric: str) -> Ledger:
    """The ledger of a sweep that is typed here and now."""
    return Ledger(metric, os.getcwd(), os.environ.get("DSFT_CONFIG_DIR"))


def read(sweep: Path) -> Ledger | None:
    """The sweep's ledger, None where there is none. Raises ValueError for a damaged one."""
    path = sweep / NAME
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text())
        book = Ledger(**{**tree, "points": [Entry(**entry) for entry in tree["points"]]})
        if wrong := _wrong(book):
            raise ValueError(wrong)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and type the sweep again, it goes on") from error
    return book


def _wrong(book: Ledger) -> str | None:
    """Return what no sweep that was typed has in its ledger; None if there is nothing."""
    for name, folder in (("cwd", book.cwd), ("config_dir", book.config_dir or "/")):
        if not isinstance(folder, str) or not os.path.isabs(folder):
            return f"{name} is {folder!r} and no absolute path"
    for entry in book.points:
        for word in entry.words:
            if not isinstance(word, str) or word.lstrip("+~").startswith("hydra"):
                return f"{word!r} is no word of a point"
    return None


@contextmanager
def alone(sweep: Path) -> Iterator[None]:
    """While inside, no other process starts points of this sweep. Raises ValueError if one does."""
    lock = FileLock(sweep / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{sweep} is being started by another process; wait for it, or end it") from error
    try:
        yield
    finally:
        lock.release()
