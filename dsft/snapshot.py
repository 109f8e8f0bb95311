"""The code of a job: a copy in the folder of its run or sweep, as it was submitted."""

import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

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


def place(folder: Path) -> Path | None:
    """Where in a run's or a sweep's folder a copy of this checkout's code belongs; None for an installed wheel."""
    if not (ROOT / ".git").exists():
        return None
    digest = hashlib.sha256()
    for file in _sources():
        digest.update(str(file).encode() + b"\0" + (ROOT / file).read_bytes())
    return folder / "code" / digest.hexdigest()[:12]


def copy(to: Path | None) -> None:
    """Make the copy, whole or not at all, if it is not there."""
    if to is None or to.is_dir():
        return
    aside = to.with_name(f".{to.name}.{os.getpid()}")
    for file in _sources():
        (aside / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, aside / file)
    aside.rename(to)


def environment(code: Path | None) -> list[str]:
    """Lines that make the job import the copy first, the user's own modules from where it was submitted last, and ask
    no hub.
    """
    own = f"{shlex.quote(str(code))}:{shlex.quote(str(code / 'launchers'))}" if code else ""
    asked = os.environ.get(PLUGINS)
    return [
        "export PYTHONSAFEPATH=1",
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
