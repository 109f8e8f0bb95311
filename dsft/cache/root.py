"""Where dsft's cache lies. It is made for its owner alone, and one that others may write is refused."""

import os
import pwd
import stat
from pathlib import Path

SHARED = "DSFT_CACHE_SHARED"
"""Set to 1 by who trusts all that may write the cache: what is not hashed whole at each start is theirs to change."""
OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_root() -> Path:
    """$DSFT_CACHE, or ~/.cache/dsft."""
    root = os.environ.get("DSFT_CACHE")
    return Path(root).expanduser() if root else _usual()


def own_root() -> Path:
    """The part of the cache that is never shared, for what is believed without a look: cache_root, or ~/.cache/dsft."""
    return _usual() if _is_shared() else cache_root()


def open_folder(root: Path, name: str) -> Path:
    """The folder of that name below root, a cache's root. Either is made if it is missing: root for its owner alone.

    Raises ValueError if it cannot be made, or if somebody else may write it and DSFT_CACHE_SHARED does not allow it.
    """
    folder = root / name
    try:
        mode = 0o777 if _is_shared() else 0o700
        make(root, mode=mode)
        folder.mkdir(mode=mode, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"DSFT_CACHE must be a folder that can be written, got {root} ({reason}); set DSFT_CACHE to another folder"
        ) from None
    if not _is_shared():
        for place in (root, folder):
            _refuse_others(place)
    return folder


def make(root: Path, *, mode: int = 0o700) -> None:
    """Make root, the root of a cache, with that mode if it is not there, and folders above it as usual."""
    root.parent.mkdir(parents=True, exist_ok=True)
    root.mkdir(mode=mode, exist_ok=True)


def others_write(place: Path) -> str | None:
    """Who besides this user and root may write place, in words; None if nobody may."""
    found = place.stat()
    if found.st_uid not in (os.geteuid(), 0):
        return _name(found.st_uid)
    if found.st_mode & OTHERS:
        return "everybody" if found.st_mode & stat.S_IWOTH else "its group"
    return None


def _refuse_others(place: Path) -> None:
    who = others_write(place)
    if who is not None:
        way = f"take the right away (chmod go-w {place})" if who in ("everybody", "its group") else "set DSFT_CACHE"
        raise ValueError(
            f"DSFT_CACHE must be a folder that you alone may write, got {place}, which {who} may write too; {way}, or, "
            f"if you trust them with your runs, set {SHARED}=1"
        )


def _is_shared() -> bool:
    value = os.environ.get(SHARED, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{SHARED} must be 0 or 1, got {value}; set it to 1 to share the cache, else unset it")
    return value == "1"


def _usual() -> Path:
    return Path.home() / ".cache" / "dsft"


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
