"""Files of a checkpoint, each read once and compared with its manifest. No torch in here."""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dsft.checkpoint.manifest import FILE, Damage, DamagedError, Manifest, header, judged, opened

CHUNK = 2**22
LINE = 200
"""Bytes of a file's beginning that are kept, to say what it is if it is not what was written."""


def verify(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Read the files called names from end to end. Raises DamagedError for the first that is not what was written."""
    for name in sorted(names):
        with checked(folder, manifest, name):
            pass


class Checked:
    """A file that is read once, from its beginning to its end: what was taken from it is what was hashed."""

    def __init__(self, name: str, stream: io.FileIO) -> None:
        self.name, self.stream, self.at, self.first, self.digest = name, stream, 0, b"", hashlib.sha256()

    def take(self, out: memoryview) -> None:
        """Fill out with the next bytes. Raises DamagedError if there are fewer."""
        done = 0
        while done < len(out):
            count = self.stream.readinto(out[done : done + CHUNK])
            if not count:
                raise DamagedError(Damage(self.name, f"ends at byte {self.at + done}"))
            self.digest.update(out[done : done + count])
            done += count
        if self.at < LINE:
            self.first += bytes(out[: LINE - self.at])
        self.at += len(out)

    def skip(self, to: int) -> None:
        """Read up to byte `to`, which must not lie behind."""
        buffer = memoryview(bytearray(min(CHUNK, max(0, to - self.at))))
        while self.at < to:
            self.take(buffer[: to - self.at])


@contextmanager
def checked(folder: Path, manifest: Manifest, name: str) -> Iterator[Checked]:
    """Open the file called name, once; what is not read inside is read at the end.

    Raises DamagedError if it is not what was written: what was taken from it is worth nothing then.
    """
    require_listed(manifest, [name])
    written = manifest.files[name]
    try:
        with opened(folder / name) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != written.size:
                raise DamagedError(Damage(name, f"has {size} bytes, {written.size} were written"))
            content = Checked(name, stream)
            yield content
            content.skip(size)
    except OSError as error:
        raise judged(name, error) from error
    if content.digest.hexdigest() != written.sha256:
        raise DamagedError(Damage(name, _what_changed(content.first, manifest)))


def require_listed(manifest: Manifest, names: Iterable[str]) -> None:
    """Raise DamagedError if the manifest does not list files that belong to the checkpoint by its index."""
    if missing := sorted(set(names) - manifest.files.keys()):
        raise DamagedError(Damage(FILE, f"does not list {missing[0]}"))


def _what_changed(first: bytes, manifest: Manifest) -> str:
    line = first.partition(b"\n")[0] + b"\n"
    expected = header(manifest.step, manifest.identity.run)
    if line.startswith(expected[:15]) and line != expected:
        return f"belongs elsewhere ({line.decode('ascii', 'replace').strip()})"
    return "its content is not what was written"
