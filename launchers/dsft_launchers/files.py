"""Files that are replaced at once, and who may read and write them."""

import os
import stat
from pathlib import Path


def replace_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Give path new content at once; on an OSError it keeps the old one, and nothing is left beside it.

    mode: as the umask leaves it.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(_made(fresh, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def _made(fresh: Path, mode: int) -> int:
    """Make a file of our own, in the place of what a process of our number left; nothing is written through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(fresh, flags, mode)
    except FileExistsError:
        fresh.unlink()
        return os.open(fresh, flags, mode)


def mode_as_usual(folder: Path) -> None:
    """Give every file below folder the mode of one that is made in folder now, as the umask or the folder has it.

    safetensors writes its files for their owner alone, whatever the umask is.
    """
    fresh = folder / f".mode.{os.getpid()}"
    os.close(_made(fresh, 0o666))
    mode = stat.S_IMODE(fresh.stat().st_mode)
    fresh.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def readable_by_all(path: Path) -> bool:
    """Return True if every user of this machine may read a file, or a folder and the files in it, by modes alone."""
    path = Path(os.path.realpath(path))
    inside = [each for each in path.iterdir() if each.is_file()] if path.is_dir() else []
    files, folders = (inside, [path, *path.parents]) if path.is_dir() else ([path], [*path.parents])
    return all(each.stat().st_mode & stat.S_IROTH for each in files) and all(
        each.stat().st_mode & stat.S_IXOTH for each in folders
    )


def write_for_nobody_else() -> None:
    """Have this process and its children make no file that every user may write, whatever the umask is."""
    os.umask(os.umask(0o077) | stat.S_IWOTH)


def sync(path: Path) -> None:
    """See a file's content, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
