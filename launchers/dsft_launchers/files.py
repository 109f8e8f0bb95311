"""Files that are replaced at once."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Give path new content at once; on an OSError it keeps the old one, and nothing is left beside it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """See a file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
