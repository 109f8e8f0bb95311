"""The user's cache of model folders: written once, complete or absent, safe when many processes start together."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsft_launchers.files import mode_as_usual


def cache_root() -> Path:
    """Where dsft keeps model folders: $DSFT_CACHE, else ~/.cache/dsft, and models/ below it."""
    root = os.environ.get("DSFT_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "dsft") / "models"


def written_once(name: str, write: Callable[[Path], None]) -> Path:
    """The folder cache_root()/name; write(empty folder) fills it if it is not there yet.

    One process writes aside and renames, the others wait for it. Raises ValueError if the cache cannot be written.
    """
    from filelock import FileLock

    folder = cache_root() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{name}.lock")
        lock.acquire()
    except OSError as error:
        raise ValueError(
            f"DSFT_CACHE must be a folder that can be written, got {folder.parent} ({error.strerror}); "
            "set DSFT_CACHE to another folder"
        ) from None
    try:
        if not folder.is_dir():
            _write_aside(folder, write)
    finally:
        lock.release()
    return folder


def save_model(model: Any, folder: Path) -> None:
    """Write model by transformers' save_pretrained, by this process, whatever its rank.

    In a process group transformers leaves that to rank 0; here the first of many that start together writes for all.
    """
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    model.save_pretrained(folder)
    if not (folder / "config.json").is_file():
        raise RuntimeError(f"transformers wrote no model to {folder}: this version leaves it to another rank")


def _write_aside(folder: Path, write: Callable[[Path], None]) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(aside)
        aside.chmod(0o755)
        mode_as_usual(aside)
        for file in aside.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
