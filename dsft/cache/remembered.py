"""SHA-256 of large files, read once: remembered in the user's own cache as long as the file stays the same one.

A file is the same while its device, inode, size, mtime and ctime are: whoever writes it, or puts another one in its
place, changes one of them. Bits that change on the disk by themselves are not seen; they are when it is read anew.
"""

import contextlib
import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsft_launchers.files import replace_text

from dsft.cache.root import make, others_write, own_root

LEAST_BYTES = 2**20
"""A smaller file is read each time: that takes less than to look it up."""
BLOCK, AHEAD = 2**22, 2**26
"""Bytes that are read at once, and how far before them the kernel is asked to read."""
FINE_NS, COARSE_NS = 10**8, 2 * 10**9
"""A file that changed so shortly before it was read may change again with the same times: they move on in ticks of a
few milliseconds, or of a second on file systems that keep no fractions."""

Same = list[int]
"""What tells a file: device, inode, size, mtime and ctime in nanoseconds."""


def same(path: Path) -> Same:
    """What tells the file that path leads to now. Raises OSError."""
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def sha256(path: Path) -> str:
    """SHA-256 of all bytes of path, hexadecimal. Raises OSError if it cannot be read.

    Of several processes of this user that ask for a large one at once, one reads and the others learn of it.
    """
    if path.stat().st_size < LEAST_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    from filelock import FileLock

    with contextlib.ExitStack() as stack:
        if (known := recall(path)) is None and (record := _record(path)) is not None:
            with contextlib.suppress(OSError):  # a cache that cannot be written: each process reads for itself
                stack.enter_context(FileLock(record.with_suffix(".lock")))
                known = recall(path)
        return known or _read(path)


def recall(path: Path) -> str | None:
    """The SHA-256 of path if it is remembered of the very file that is there now."""
    before = _remembered(path)
    return before[1] if before is not None and before[0] == same(path) else None


def unread(paths: Iterable[Path]) -> int:
    """Bytes that sha256 of all paths would read."""
    large = ((path, path.stat().st_size) for path in paths)
    return sum(size for path, size in large if size < LEAST_BYTES or recall(path) is None)


def replaced(paths: Iterable[Path]) -> bool:
    """Return True if one of paths is remembered, and is another file now."""
    return any((before := _remembered(path)) is not None and before[0] != same(path) for path in paths)


def _read(path: Path) -> str:
    before, begun, state = same(path), time.time_ns(), hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        for start in itertools.count(AHEAD, BLOCK):  # the disk goes on while a block is hashed
            os.posix_fadvise(stream.fileno(), start, BLOCK, os.POSIX_FADV_WILLNEED)
            if not (block := stream.read(BLOCK)):
                break
            state.update(block)
    changed_ns = max(before[3:])
    margin = FINE_NS if changed_ns % 10**9 else COARSE_NS
    if same(path) == before and changed_ns < begun - margin:
        _remember(path, before, state.hexdigest())
    return state.hexdigest()


def _remember(path: Path, now: Sequence[int], digest: str) -> None:
    record = _record(path)
    if record is not None:
        with contextlib.suppress(OSError):  # it is read again the next time
            replace_text(record, json.dumps({"path": str(path), "same": now, "sha256": digest}) + "\n")


def _remembered(path: Path) -> tuple[Same, str] | None:
    record = _record(path)
    try:
        found = json.loads(record.read_text()) if record is not None else None
        return None if found is None else (list(found["same"]), str(found["sha256"]))
    except (OSError, ValueError, LookupError, TypeError):  # never known, or a damaged note: it is read again
        return None


def _record(path: Path) -> Path | None:
    """Where path is remembered: by its name and device, which may differ among nodes. None where others may write."""
    place = own_root() / "digests"
    try:
        make(place.parent)
        place.mkdir(mode=0o700, exist_ok=True)
        if any(others_write(each) for each in (place, place.parent)):
            return None
        name = f"{path.resolve()}\0{path.stat().st_dev}"
    except OSError:
        return None
    return place / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"
