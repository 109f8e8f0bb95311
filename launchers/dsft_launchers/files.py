"""Files that are replaced at once."""

import os
import stat
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


def mode_as_usual(folder: Path) -> None:
    """Give every file below folder the mode of one that is made in folder now, as the umask or the folder has it.

    safetensors writes its files for their owner alone, whatever the umask is.
    """
    fresh = folder / f".mode.{os.getpid()}"
    fresh.touch()
    mode = stat.S_IMODE(fresh.stat().st_mode)
    fresh.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def sync(path: Path) -> None:
    """See a file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
