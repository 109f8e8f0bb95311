"""The user's cache of model folders: written once, complete or absent, safe when many processes start together."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsft_launchers.files import mode_as_usual

from dsft.cache import root, sealed
from dsft.cache.remembered import sha256

MODELS = "models"


def cache_root() -> Path:
    """Where dsft keeps model folders: models/ below $DSFT_CACHE, else below ~/.cache/dsft."""
    return root.cache_root() / MODELS


def written_once(name: str, write: Callable[[Path], None]) -> Path:
    """The folder cache_root()/name; write(empty folder) fills it if it is not there yet, or is not as it was written.

    One process writes aside and renames, the others wait for it. Raises ValueError if the cache cannot be written, or
    may be written by others.
    """
    from filelock import FileLock

    folder = root.open_folder(root.cache_root(), MODELS) / name
    if folder.is_dir() and sealed.changed(folder, CONTENTS) is None:
        return folder
    try:
        lock = FileLock(folder.parent / f".{name}.lock")
        lock.acquire()
    except OSError as error:
        raise ValueError(
            f"DSFT_CACHE must be a folder that can be written, got {folder.parent} ({error.strerror}); "
            "set DSFT_CACHE to another folder"
        ) from None
    try:
        wrong = sealed.changed(folder, CONTENTS) if folder.is_dir() else ""
        if wrong is not None:
            _write_aside(folder, write, wrong)
    finally:
        lock.release()
    return folder


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in folder, of large ones as they are remembered."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sealed.names_in(folder)}


CONTENTS: sealed.Contents = {"files": digests}


def save_model(model: Any, folder: Path) -> None:
    """Write model by transformers' save_pretrained, by this process, whatever its rank.

    In a process group transformers leaves that to rank 0; here the first of many that start together writes for all.
    """
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    model.save_pretrained(folder)
    if not (folder / "config.json").is_file():
        raise RuntimeError(f"transformers wrote no model to {folder}: this version leaves it to another rank")


def _write_aside(folder: Path, write: Callable[[Path], None], wrong: str) -> None:
    """Write, and give the folder its name. wrong: what is wrong with the one that has it, "" if there is none."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(aside)
        aside.chmod(0o755)
        mode_as_usual(aside)
        sealed.seal(aside, CONTENTS)
        for file in aside.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        old = sealed.make_way(folder, "the unpacked model", wrong) if wrong else None
        aside.rename(folder)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)  # who reads it has its files open
    finally:
        shutil.rmtree(aside, ignore_errors=True)
