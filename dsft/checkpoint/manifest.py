"""manifest.json, written last: what makes a folder of files a checkpoint. No torch in here."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "manifest.json"
FORMAT = 1
CHUNK = 2**22


class DamagedError(Exception):
    """A file of a checkpoint is not what was written."""

    def __init__(self, file: str, why: str) -> None:
        super().__init__(f"{file}: {why}")
        self.file, self.why = file, why


@dataclass(frozen=True)
class Written:
    """One file: its size in bytes and the SHA-256 of its content, taken while it was written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to.

    config: digest of all keys that decide the numbers; base, data: digests of their content.
    """

    run: str
    config: str
    base: str
    data: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """step: updates done; world_size: ranks that wrote it (any number may read it); lease: the writer's token.

    progress: the loop's own state. files: name -> what was written; the manifest itself is not among them.
    """

    step: int
    identity: Identity
    world_size: int
    lease: int
    progress: Mapping[str, Any]
    files: Mapping[str, Written]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def header(step: int, run: str) -> bytes:
    """The first line of every data file: a file of another step is known by it."""
    return f"dsft checkpoint, step {step}, run {run}\n".encode()


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into folder, with its own digest, and see it on the disk."""
    content = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps({**content, "digest": _digest(content)}, indent=1, sort_keys=True)
    with (folder / FILE).open("w", encoding="ascii") as out:
        out.write(text + "\n")
        out.flush()
        os.fsync(out.fileno())


def read(folder: Path) -> Manifest:
    """The manifest of folder. Raises DamagedError if it is absent, changed, or another step's."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="ascii"))
        digest = content.pop("digest")
    except FileNotFoundError:
        raise DamagedError(FILE, "is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(FILE, f"is no manifest ({error})") from error
    except OSError as error:
        raise _judged(FILE, error) from error
    if digest != _digest(content):
        raise DamagedError(FILE, "its digest does not match its content")
    if content.pop("format") != FORMAT:
        raise DamagedError(FILE, f"is of another format than {FORMAT}")
    files = {name: Written(**written) for name, written in content.pop("files").items()}
    manifest = Manifest(**{**content, "identity": Identity(**content["identity"]), "files": files})
    if folder.name.split(".")[0] != folder_name(manifest.step):
        raise DamagedError(FILE, f"belongs to step {manifest.step}")
    return manifest


def verify(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Read the files called names from end to end. Raises DamagedError for the first that is not what was written."""
    for name in sorted(names):
        written = manifest.files.get(name)
        if written is None:
            raise DamagedError(FILE, f"does not list {name}")
        try:
            size = (folder / name).stat().st_size
            if size != written.size:
                raise DamagedError(name, f"has {size} bytes, {written.size} were written")
            if _sha256(folder / name) != written.sha256:
                raise DamagedError(name, _what_changed(folder / name, manifest))
        except FileNotFoundError:
            raise DamagedError(name, "is missing") from None
        except OSError as error:
            raise _judged(name, error) from error


def _judged(name: str, error: OSError) -> Exception:
    """Damage, if the disk cannot give the bytes; else (no right to read, too many open files) the error itself."""
    if error.errno == errno.EIO:
        return DamagedError(name, f"cannot be read ({os.strerror(errno.EIO)})")
    return error


def folder_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def _what_changed(path: Path, manifest: Manifest) -> str:
    with path.open("rb") as file:
        line = file.readline(200)
    expected = header(manifest.step, manifest.identity.run)
    if line.startswith(expected[:15]) and line != expected:
        return f"belongs elsewhere ({line.decode('ascii', 'replace').strip()})"
    return "its content is not what was written"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
