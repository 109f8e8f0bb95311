"""The code that a SLURM job imports, a copy in the folder of its run or sweep: is it still what was submitted."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LIST = "files.json"
"""In the copy: its files, each with the SHA-256 of its content."""


def listed(contents: Mapping[str, bytes]) -> str:
    """The text of LIST for files with these contents, by their names in the copy."""
    return json.dumps({name: _sha256(content) for name, content in sorted(contents.items())}, indent=0) + "\n"


def digest_of(text: str) -> str:
    """The digest of a copy: SHA-256 of its list. Its folder is called by the first 12 digits."""
    return _sha256(text.encode())


def name_of(digest: str) -> str:
    """Return what the folder of a copy with that digest is called."""
    return digest[:12]


def changed(code: Path, digest: str) -> str | None:
    """Name of the first file in the copy that is not what was submitted, None if all of them are.

    A file that was added is one too, a compiled one as well: Python would import it in place of its source.
    """
    try:
        text = (code / LIST).read_bytes()
    except OSError:
        return LIST
    if _sha256(text) != digest:
        return LIST
    known: dict[str, str] = json.loads(text)
    there = {path.relative_to(code).as_posix() for path in code.rglob("*") if path.is_symlink() or not path.is_dir()}
    for name in sorted((there - {LIST}) | known.keys()):
        if (code / name).is_symlink() or not (code / name).is_file() or name not in known:
            return name
        if _sha256((code / name).read_bytes()) != known[name]:
            return name
    return None


def imports_another(run_dir: Path, code: Path) -> str | None:
    """Why a job must not go on with what it imports, in one line; None if that is what was submitted for run_dir.

    code: the folder that the process imports its code from. A run that a wheel submitted has no copy.
    """
    job: dict[str, Any] = json.loads((run_dir / "slurm" / "job.json").read_text())
    digest = job.get("code_digest")
    if digest is None:
        return None
    if code.name != name_of(digest):
        return f"the job imports {code}, and not the copy of the code that was submitted, code/{name_of(digest)}"
    wrong = changed(code, digest)
    if wrong is None:
        return None
    return f"{code / wrong} is not what was submitted (slurm/job.json); remove {code} and start the run again"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
