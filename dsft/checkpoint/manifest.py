"""manifest.json, written last: what makes a folder of files a checkpoint. No torch in here."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FILE = "manifest.json"
FORMAT = 1
CHUNK = 2**22

UNREADABLE = (errno.EIO, errno.ELOOP, errno.EISDIR, errno.ENOTDIR)
"""Errors of reading a file that say that it is not what was written. Others (no right, too many open files) do not."""


@dataclass(frozen=True)
class Damage:
    """A finding about a checkpoint, which ranks send to each other: the file that is not what was written, and how."""

    file: str
    why: str

    def __str__(self) -> str:
        return f"{self.file}: {self.why}"


class DamagedError(Exception):
    """A file of a checkpoint is not what was written. It carries its Damage and stays in its process."""

    @property
    def damage(self) -> Damage:
        """The Damage that it was made of."""
        found: Damage = self.args[0]
        return found


class NewerError(RuntimeError):
    """A checkpoint was made by a later dsft: it is whole, and this dsft cannot read it."""


@dataclass(frozen=True)
class Written:
    """One file: its size in bytes and the SHA-256 of its content, taken while it was written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to.

    config: digest of all keys that decide the numbers; base: fingerprint of the base model; data: digest of its
    content. base_digest: of all bytes of the base, None while it is being read, and of an older dsft.
    """

    run: str
    config: str
    base: str
    data: str
    base_digest: str | None = None


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
    """Return the manifest of folder. Raises DamagedError if it is absent, changed, or another step's.

    Raises NewerError if a later dsft has made it.
    """
    content = _whole(folder)
    try:
        manifest = _understood(content)
        other = folder.name.split(".")[0] != folder_name(manifest.step)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise DamagedError(Damage(FILE, f"is no manifest ({type(error).__name__}: {error})")) from error
    except NewerError as error:
        raise NewerError(f"{folder.name} was made by a later dsft ({error})") from None
    if other:
        raise DamagedError(Damage(FILE, f"belongs to step {manifest.step}"))
    return manifest


def _whole(folder: Path) -> dict[str, Any]:
    """Return what the manifest of folder says, if its digest matches."""
    path = folder / FILE
    try:
        if not folder.is_dir():
            raise DamagedError(_no_folder(folder))
        if not stat.S_ISREG(path.stat().st_mode):
            raise DamagedError(Damage(FILE, "is not a file"))
        content: dict[str, Any] = json.loads(path.read_text(encoding="ascii"))
        digest = content.pop("digest")
    except OSError as error:
        raise _judged(FILE, error) from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(Damage(FILE, "is no manifest")) from error
    if digest != _digest(content):
        raise DamagedError(Damage(FILE, "its digest does not match its content"))
    return content


def _no_folder(folder: Path) -> Damage:
    """Return what is in the place of a checkpoint's folder."""
    if not folder.is_symlink() and folder.exists():
        return Damage(folder.name, "is not a folder")
    return Damage(folder.name, "is a link that leads nowhere" if folder.is_symlink() else "is missing")


def _understood(content: Mapping[str, Any]) -> Manifest:
    """Return the manifest that content spells. Raises NewerError if it holds more than this dsft knows."""
    if content["format"] > FORMAT:
        raise NewerError(f"its manifest is of format {content['format']}, this one knows {FORMAT}")
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}")
    _refuse_unknown(content, ["format", *(field.name for field in fields(Manifest))])
    for part, kind in [(content["identity"], Identity), *((each, Written) for each in content["files"].values())]:
        _refuse_unknown(part, [field.name for field in fields(kind)])
    if not isinstance(content["progress"], Mapping):
        raise TypeError("its progress is none")
    identity = Identity(**content["identity"])
    files = {name: Written(**written) for name, written in content["files"].items()}
    rest = {key: value for key, value in content.items() if key not in ("format", "identity", "files")}
    return Manifest(**rest, identity=identity, files=files)


def _refuse_unknown(content: Mapping[str, Any], known: Iterable[str]) -> None:
    if more := sorted(content.keys() - set(known)):
        raise NewerError(f"its manifest holds {', '.join(more)}, which this one does not know")


def verify(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Read the files called names from end to end. Raises DamagedError for the first that is not what was written."""
    for name in sorted(names):
        require_listed(manifest, [name])
        written = manifest.files[name]
        try:
            found = (folder / name).stat()
            if not stat.S_ISREG(found.st_mode):
                raise DamagedError(Damage(name, "is not a file"))
            if found.st_size != written.size:
                raise DamagedError(Damage(name, f"has {found.st_size} bytes, {written.size} were written"))
            if _sha256(folder / name) != written.sha256:
                raise DamagedError(Damage(name, _what_changed(folder / name, manifest)))
        except OSError as error:
            raise _judged(name, error) from error


def require_listed(manifest: Manifest, names: Iterable[str]) -> None:
    """Raise DamagedError if the manifest does not list files that belong to the checkpoint by its index."""
    if missing := sorted(set(names) - manifest.files.keys()):
        raise DamagedError(Damage(FILE, f"does not list {missing[0]}"))


def _judged(name: str, error: OSError) -> Exception:
    """Return a DamagedError if the file called name is not there or gives no bytes, else the error itself."""
    if error.errno == errno.ENOENT:
        return DamagedError(Damage(name, "is missing"))
    if error.errno in UNREADABLE:
        return DamagedError(Damage(name, f"cannot be read ({os.strerror(error.errno)})"))
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
