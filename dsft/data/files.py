"""A local file of rows: jsonl, json, csv or parquet, told by its suffix."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from dsft.data.json_rows import read_json, read_jsonl
from dsft.data.records import Record
from dsft.data.tables import read_csv, read_parquet
from dsft.offline import AbsentError

_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def check_file(path: str, *, key: str) -> None:
    """Raise ValueError unless path is a file with content whose suffix can be read; key is the configuration key."""
    file = Path(path).expanduser()
    if not file.exists():
        raise AbsentError(f"{key} must be a file that exists, got {path}; correct the path")
    if not file.is_file():
        raise ValueError(
            f"{key} must be a file, got the folder {path}; name one file in it, or use data=hf for a folder"
        )
    if file.suffix.lower() not in _READERS:
        raise ValueError(f"{key} must end with one of {' '.join(_READERS)}, got {path}; convert or rename the file")
    if file.stat().st_size == 0:
        raise ValueError(f"{key} must hold rows, got the empty file {path}; write rows or name another")


def read_records(path: str) -> Iterator[Record]:
    """Records of the file at path, in order, broken ones with their fault. Raises ValueError for a broken file."""
    file = Path(path).expanduser()
    return _READERS[file.suffix.lower()](file)


def digest_file(path: str) -> str:
    """SHA-256 of the file's bytes, hexadecimal."""
    with Path(path).expanduser().open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
