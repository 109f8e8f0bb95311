"""manifest.json, written last: what makes a folder of files a checkpoint. No torch in here."""

import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dsft.checkpoint import index
from dsft.checkpoint.index import Index

FILE = "manifest.json"
FORMAT = 2
UNINDEXED = 1
"""The format before, whose index is a file of its own."""
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

    progress: the loop's own state. files: name -> what was written; the manifest itself is not among them. index: where
    each tensor lies in them; None for a checkpoint of an earlier dsft, which has it in a file of its own.
    """

    step: int
    identity: Identity
    world_size: int
    lease: int
    progress: Mapping[str, Any]
    files: Mapping[str, Written]
    index: Index | None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())


def header(step: int, run: str) -> bytes:
    """The first line of every data file: a file of another step is known by it."""
    return f"dsft checkpoint, step {step}, run {run}\n".encode()


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into folder, with its own digest, and see it on the disk."""
    assert manifest.index is not None, "earlier formats are read and not written"
    content = {
        "format": FORMAT,
        **{field.name: getattr(manifest, field.name) for field in fields(manifest)},
        "identity": asdict(manifest.identity),
        "files": {name: asdict(written) for name, written in manifest.files.items()},
        "index": index.plain(manifest.index),
    }
    text = _lines({**content, "digest": _digest(content)})
    with (folder / FILE).open("w", encoding="ascii") as out:
        out.write(text + "\n")
        out.flush()
        os.fsync(out.fileno())


def _lines(content: Mapping[str, Any]) -> str:
    """Return content as JSON with a line for each of its parts, and for each of theirs."""
    parts = {}
    for key, value in sorted(content.items()):
        if isinstance(value, dict):
            entries = (f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in sorted(value.items()))
            parts[key] = "{\n" + ",\n".join(entries) + "\n }"
        else:
            parts[key] = json.dumps(value)
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {text}" for key, text in parts.items()) + "\n}"


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
        with opened(path) as stream:
            content: dict[str, Any] = json.loads(stream.readall().decode("ascii"))
        digest = content.pop("digest")
    except OSError as error:
        raise judged(FILE, error) from error
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
    if content["format"] not in (UNINDEXED, FORMAT):
        raise ValueError(f"format {content['format']}")
    unknown = ("index",) if content["format"] == UNINDEXED else ()
    _refuse_unknown(content, ["format", *(field.name for field in fields(Manifest) if field.name not in unknown)])
    for part, kind in [(content["identity"], Identity), *((each, Written) for each in content["files"].values())]:
        _refuse_unknown(part, [field.name for field in fields(kind)])
    if not isinstance(content["progress"], Mapping):
        raise TypeError("its progress is none")
    identity = Identity(**content["identity"])
    files = {_plain_name(name): Written(**written) for name, written in content["files"].items()}
    held = None if unknown else index.understood(content["index"])
    rest = {key: value for key, value in content.items() if key not in ("format", "identity", "files", "index")}
    return Manifest(**rest, identity=identity, files=files, index=held)


def _plain_name(name: str) -> str:
    """Return name, which must be that of a file in the checkpoint's own folder, else raise ValueError."""
    if name != os.path.basename(name) or name in ("", ".", "..", FILE) or "\0" in name:
        raise ValueError(f"{name!r:.100} is not the name of a file in this folder")
    return name


def _refuse_unknown(content: Mapping[str, Any], known: Iterable[str]) -> None:
    if more := sorted(content.keys() - set(known)):
        raise NewerError(f"its manifest holds {', '.join(more)}, which this one does not know")


@contextmanager
def opened(path: Path) -> Iterator[io.FileIO]:
    """Open a file to read from it; looked at before too, since a pipe would be waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DamagedError(Damage(path.name, "is not a file"))
    with path.open("rb", buffering=0) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise DamagedError(Damage(path.name, "is not a file"))
        yield stream


def judged(name: str, error: OSError) -> Exception:
    """Return a DamagedError if the file called name is not there or gives no bytes, else the error itself."""
    if error.errno == errno.ENOENT:
        return DamagedError(Damage(name, "is missing"))
    if error.errno in UNREADABLE:
        return DamagedError(Damage(name, f"cannot be read ({os.strerror(error.errno)})"))
    return error


def folder_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
