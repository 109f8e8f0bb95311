"""Rows of csv and parquet files. A row that is broken is a Record with a fault; a file that is broken raises."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsft.data.records import Record, bad_record, check_names, table_values

_LONGEST = 2**31 - 1
"""Characters of a csv field: the largest that the module's C long holds on every platform."""


def read_csv(file: Path) -> Iterator[Record]:
    """A header and comma-separated values, quoted where they hold a comma or a line's end. Values are text."""
    # The limit is the process's, not the reader's: 131,072 characters, which a long document exceeds. Nothing else in
    # a run reads csv, and a field that is too long for memory fails there and not here.
    csv.field_size_limit(_LONGEST)
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:  # a bad byte is half a pair
        reader = csv.reader(stream, strict=True)
        header = _header(reader, file)
        row, line = 0, reader.line_num + 1
        while True:
            place = f"{file}:{line}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield bad_record(row, place, f"must be valid CSV: {error}; correct the line or save as jsonl")
            else:
                if values is None:
                    return
                if not values:  # a blank line, which is no row
                    line = reader.line_num + 1
                    continue
                yield _csv_record(row, place, header, values)
            row, line = row + 1, reader.line_num + 1


def _csv_record(row: int, place: str, header: list[str], values: list[str]) -> Record:
    if len(values) != len(header):
        reason = f"must have {len(header)} values like the header, got {len(values)}; quote the commas"
        return bad_record(row, place, reason)
    if not all(_is_text(value) for value in values):
        return bad_record(row, place, "must be UTF-8: invalid byte; save the file as UTF-8")
    return Record(row, place, dict(zip(header, values, strict=True)))


def _header(reader: Any, file: Path) -> list[str]:
    try:
        header: list[str] = next((line for line in reader if line), [])
    except csv.Error as error:
        raise ValueError(f"{file}:1 must be a header of valid CSV: {error}; correct it or save as jsonl") from None
    if not all(map(_is_text, header)):
        raise ValueError(f"{file}:1 must be UTF-8: invalid byte; save the file as UTF-8")
    other = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        shown = {"\t": "tabs", ";": "semicolons", "|": "bars"}[other]
        raise ValueError(
            f"{file}:1 must separate values by commas, got one column {header[0]!r}, separated by {shown}; "
            "save it with commas, or as jsonl"
        )
    check_names(header, f"{file}:1")
    return header


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_parquet(file: Path) -> Iterator[Record]:
    """A parquet file's rows, batch by batch."""
    row = 0
    try:
        with pq.ParquetFile(file) as table:
            check_names(table.schema_arrow.names, str(file))
            for batch in table.iter_batches(batch_size=1024):
                for values in _rows_of(batch):
                    place = f"{file} row {row}"
                    yield bad_record(row, place, values) if isinstance(values, str) else Record(row, place, values)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} must be a whole parquet file: {reason}; write or copy it again") from None


def _rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Each row as Python values, or why it cannot be one (text that is not UTF-8, a date out of range)."""
    try:
        yield from [table_values(values) for values in batch.to_pylist()]
    except (ValueError, OverflowError):  # one row spoils the batch: find out which
        for index in range(batch.num_rows):
            try:
                yield table_values(batch.slice(index, 1).to_pylist()[0])
            except (ValueError, OverflowError) as error:
                yield f"must hold values that can be read, got {error}; write the row again".replace("\n", " ")
