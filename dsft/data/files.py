"""Records of a local file: jsonl, json, csv or parquet, each with its row number and the place to find it."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dsft.offline import AbsentError


class Record(NamedTuple):
    """One row as it lies in the file. row is zero-based; for jsonl it is the line's index, blank lines included."""

    row: int
    place: str
    values: dict[str, Any]


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
        raise ValueError(f"{key} must hold rows, got the empty file {path}")


def read_records(path: str) -> Iterator[Record]:
    """Records of the file at path, in order. Raises ValueError naming file and line of the first broken one."""
    file = Path(path).expanduser()
    return _READERS[file.suffix.lower()](file)


def digest_file(path: str) -> str:
    """SHA-256 of the file's bytes, hexadecimal."""
    with Path(path).expanduser().open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_jsonl(file: Path) -> Iterator[Record]:
    with file.open("rb") as stream:
        for row, line in enumerate(stream):
            text = _decode(line, f"{file}:{row + 1}", first=row == 0)
            if text.strip():
                place = f"{file}:{row + 1}"
                yield Record(row, place, _as_object(_parse(text, place), place))


def _read_json(file: Path) -> Iterator[Record]:
    """A JSON array of objects, or, where the file starts with an object, one object a line."""
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"{":
        yield from _read_jsonl(file)
        return
    text = _decode(file.read_bytes(), str(file), first=True)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}:{error.lineno} must be valid JSON: {error.msg}; correct or complete the file"
        ) from None
    if not isinstance(rows, list):
        raise ValueError(f"{file} must hold a JSON array of objects or one object a line, got {type(rows).__name__}")
    for row, values in enumerate(rows):
        place = f"{file} row {row}"
        yield Record(row, place, _as_object(values, place))


def _read_csv(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        row, line = 0, 2
        while True:
            place = f"{file}:{line}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{place} must be valid CSV: {error}; correct the line or save as jsonl") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{place} must be UTF-8: {error.reason}; save the file as UTF-8") from None
            if values is None:
                return
            if None in values or None in values.values():
                columns = len(reader.fieldnames or ())
                raise ValueError(
                    f"{place} must have {columns} values like the header, got another number; quote the commas"
                )
            yield Record(row, place, values)
            row, line = row + 1, reader.line_num + 1


def _read_parquet(file: Path) -> Iterator[Record]:
    try:
        row = 0
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield Record(row, f"{file} row {row}", values)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} must be a whole parquet file: {reason}; write or copy it again") from None


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _decode(data: bytes, place: str, *, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} must be UTF-8: {error.reason}; save the file as UTF-8") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{place} must be one JSON object a line: {reason}; correct or complete the line") from None


def _as_object(values: Any, place: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(values).__name__}; write rows as {{column: value}}")
    return values
