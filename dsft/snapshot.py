"""The code of a job: a copy in the folder of its run or sweep, as it was submitted."""

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from dsft_launchers import copied

from dsft import offline
from dsft.locate import PLUGINS
from dsft.searched import TYPED_IN, own_folder

ROOT = Path(__file__).parents[1]
PARTS = ("dsft", "conf", "launchers")
"""What of a checkout a run needs."""

NO_EMPTY_ENTRY = (
    "while [[ $PYTHONPATH == *::* ]]; do PYTHONPATH=${PYTHONPATH//::/:}; done",
    "PYTHONPATH=${PYTHONPATH#:}",
    "export PYTHONPATH=${PYTHONPATH%:}",
)
"""An empty entry of PYTHONPATH is the folder that a process starts in."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of this checkout's code. place: its folder; listed: what its list says (dsft_launchers.copied)."""

    place: Path
    listed: str

    @property
    def digest(self) -> str:
        """Of all its files and their names, SHA-256."""
        return copied.digest_of(self.listed)


def of(folder: Path) -> Snapshot | None:
    """The copy that belongs into a run's or a sweep's folder, as the code is now; None for an installed wheel."""
    if not (ROOT / ".git").exists():
        return None
    text = copied.listed({file.as_posix(): (ROOT / file).read_bytes() for file in _sources()})
    return Snapshot(folder / "code" / copied.name_of(copied.digest_of(text)), text)


def copy(snapshot: Snapshot | None) -> None:
    """Make the copy, whole or not at all, if it is not there; nobody may write it. Raises ValueError for another one.

    It is made of what this checkout holds now, and compared with what it held when the job was described.
    """
    if snapshot is None:
        return
    place = snapshot.place
    if not place.is_dir():
        aside = place.with_name(f".{place.name}.{os.getpid()}")
        for file in _sources():
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, aside / file)
        (aside / copied.LIST).write_text(snapshot.listed, encoding="utf-8")
        for path in sorted(aside.rglob("*"), reverse=True):
            path.chmod(0o500 if path.is_dir() else 0o400)
        aside.chmod(0o500)
        aside.rename(place)
    wrong = copied.changed(place, snapshot.digest)
    if wrong is not None:
        raise ValueError(
            f"{place} must hold the code as it was when the job was submitted, got another {wrong}; remove that folder "
            "(chmod -R u+w, rm -r) and start the run again"
        )


def environment(snapshot: Snapshot | None) -> list[str]:
    """Lines that make the job import the copy first, the user's own modules from where it was submitted last, and ask
    no hub. Python leaves nothing in the copy: a compiled file would be imported in place of its source.
    """
    code = snapshot and snapshot.place
    own = f"{shlex.quote(str(code))}:{shlex.quote(str(code / 'launchers'))}" if code else ""
    asked = os.environ.get(PLUGINS)
    return [
        "export PYTHONSAFEPATH=1",
        *(["export PYTHONDONTWRITEBYTECODE=1"] if code else []),
        f"PYTHONPATH={own}:${{PYTHONPATH-}}",
        *NO_EMPTY_ENTRY,
        f"export {TYPED_IN}={shlex.quote(os.environ.get(TYPED_IN, own_folder()))}",
        *([f"export {PLUGINS}={shlex.quote(asked)}"] if asked else []),
        *offline.exports(),
    ]


def _sources() -> list[Path]:
    """Files of the code that git tracks or would: with changes, without what is ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise ValueError(f"the code in {ROOT} must be readable by git, which copies it for the job: {said}") from error
    return sorted(Path(name) for name in filter(None, listed.split("\0")) if (ROOT / name).is_file())
