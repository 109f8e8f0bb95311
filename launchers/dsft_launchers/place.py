"""A folder of this user alone in which the ranks of one machine meet: what is in it, nobody else can read or write."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

MEETING = "DSFT_MEETING"
"""Names the folder to the ranks."""
PREFIX = "dsft-meeting-"


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a fresh folder that only this user can enter, on this machine; it is gone afterwards.

    Below XDG_RUNTIME_DIR where that is this user's own, which lies in memory and goes at logout, else below TMPDIR or
    /tmp. Raises ValueError if neither takes such a folder.
    """
    folder = _made(os.environ)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _made(env: Mapping[str, str]) -> Path:
    temporary, why = tempfile.gettempdir(), ""
    runtime = env.get("XDG_RUNTIME_DIR", "")
    for parent in (runtime, temporary) if runtime and is_private(Path(runtime)) else (temporary,):
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        except OSError as error:  # read-only, full, or gone: as a login's own folder is after it
            why = str(error.strerror)
            continue
        if is_private(folder):
            return folder
        folder.rmdir()
        why = "it lets others into a folder made for its owner alone"
    raise ValueError(
        f"TMPDIR must be a local folder in which ranks can meet in private, got {temporary} ({why}); set it to one"
    )


def is_private(folder: Path) -> bool:
    """Return True if folder is a folder of this user that nobody else may enter."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077
