"""A run folder's path before anything is in it: whether a folder can be made, read and written there."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

DEEPEST = "checkpoints/step-00000000.tmp-00000000.old-00000000/__0000_0.distcp"
"""The longest path in a run folder, of those that every run has."""


def check_place(run_dir: Path) -> None:
    """Refuse a folder that cannot be made, read or written; nothing is created."""
    with at_the_door(run_dir):
        place = _existing(run_dir)
        if not place.is_dir():
            what = "a link to nowhere" if place.is_symlink() else "a file"
            raise ValueError(f"run_dir must be a folder, got {run_dir}: {place} is {what}; choose another run_dir")
        _try(run_dir, place)
        if place == run_dir:
            os.listdir(run_dir)
        if os.path.lexists(place / "checkpoints"):
            _try(run_dir, place / "checkpoints")
            os.listdir(place / "checkpoints")


def _try(run_dir: Path, place: Path) -> None:
    """Write to place without a trace: os.access tells nothing to root, nor of an odd file system."""
    with at_the_door(run_dir, place), tempfile.TemporaryFile(dir=place) as probe:
        probe.write(bytes(4096))


def _existing(run_dir: Path) -> Path:
    """Return the deepest part of run_dir's path that exists. Raises OSError if the others could not be made there."""
    try:
        os.lstat(Path(os.path.abspath(run_dir), DEEPEST))
    except OSError as error:  # other troubles are found where they are
        if error.errno == errno.ENAMETOOLONG:
            raise
    place, missing = run_dir, list[str]()
    while not os.path.lexists(place):
        missing.append(place.name)
        place = place.parent
    for name in missing:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(place / name)
    return place


@contextlib.contextmanager
def at_the_door(run_dir: Path, place: Path | None = None) -> Iterator[None]:
    """Turn an OSError into the refusal of run_dir, in one line. place: where it happened; else the error says it."""
    try:
        yield
    except OSError as error:
        reason, where = error.strerror or str(error), place or error.filename
        inside = f" in {brief(where)}" if where and os.fspath(where) != str(run_dir) else ""
        raise ValueError(f"run_dir must be writable, got {brief(run_dir)}: {reason}{inside}; choose another") from error


def brief(path: object) -> str:
    """Return path for a message, shortened in the middle if it is very long."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]} ({len(text):,} characters)"
