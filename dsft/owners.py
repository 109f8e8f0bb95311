"""Whose a folder is: what others may write there can be anything by the time that it is read."""

import grp
import os
import pwd
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = 0
TRUST = "--trust"
"""The flag that goes on in spite of it, for the command that it is typed with."""


def owner_of(path: Path) -> str:
    """Return the name of the user who owns path, or the number where no name is known."""
    return _name(os.stat(path).st_uid)


def doubt(path: Path) -> str | None:
    """Return why the content of path may be another's, or None: the user or root owns it, and not all may write it.

    A link counts as what it leads to, and may itself be no other user's. Raises OSError for what is not there.
    """
    found, link = os.stat(path), os.lstat(path)
    for uid in (found.st_uid, link.st_uid):
        if uid not in (os.geteuid(), ROOT):
            return f"belongs to {_name(uid)}"
    if found.st_mode & stat.S_IWOTH:
        return f"may be written by anybody (mode {stat.S_IMODE(found.st_mode):04o}, owned by {_name(found.st_uid)})"
    return None


def check(folder: Path, what: str, *, trust: bool, depth: int = 2, note: bool = True) -> None:
    """Refuse a folder that another user may have written; with note, one line on stderr names what a group may write.

    what: how the command line calls it; depth: how far down its content is looked at, 0: the folder alone. A folder
    that is not there is nobody's. Raises ValueError.
    """
    told = False
    for path in _below(folder, depth):
        try:
            why, mode = doubt(path), os.stat(path)
        except OSError:  # gone meanwhile, a dead link, or not to be seen: whoever reads it says so
            continue
        if why is not None and not trust:
            raise ValueError(
                f"{what} must be a folder that no other user writes, got {path}, which {why}; see what is in it, then "
                f"add {TRUST}, or make it yours alone (chown, chmod o-w)"
            )
        if why is None and mode.st_mode & stat.S_IWGRP:
            why = f"may be written by its group, {_group(mode.st_gid)} (owned by {_name(mode.st_uid)})"
        if why is not None and note and not told:  # the first of them says it
            print(f"dsft: note: {path} {why}", file=sys.stderr)
            told = True


def doubts(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield each folder and file below folder whose content may be another's, and why."""
    for path in reached(folder):
        try:
            why = doubt(path)
        except OSError:  # a dead link, or not to be seen: nothing is read of it
            continue
        if why is not None:
            yield path, why


def reached(folder: Path) -> Iterator[Path]:
    """Yield all that is reached from folder, through links to folders too, each folder once."""
    seen = set[tuple[int, int]]()
    for place, folders, files in os.walk(folder, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        yield from (Path(place) / name for name in (*folders, *files))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Yield folder and what is in it, as deep as that; links are not followed further."""
    if not os.path.lexists(folder):
        return
    yield folder
    if depth == 0 or not folder.is_dir():
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # it cannot be read, which whoever reads it says
        return
    for name in names:
        path = folder / name
        yield from _below(path, 0 if path.is_symlink() else depth - 1)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"group {gid}"
