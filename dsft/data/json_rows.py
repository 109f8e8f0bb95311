"""Rows of jsonl and json files. A line that is broken is a Record with a fault; a file that is broken raises."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsft.data.records import Record, bad_record, kind

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_LONG_NUMBER = re.compile(r"\d{4301,}")
"""More digits than Python turns into an integer (sys.set_int_max_str_digits)."""


DEEP = "must not be nested so deep that it cannot be read; drop or flatten the row"


class _TwiceError(ValueError):
    """An object has a key twice: json.loads would take the last one without a word."""


def read_jsonl(file: Path) -> Iterator[Record]:
    """One object a line. Raises ValueError if the file is not UTF-8 from its beginning."""
    with file.open("rb") as stream:
        _refuse_utf16(stream.read(2), file)
        stream.seek(0)
        for row, line in enumerate(stream):
            place = f"{file}:{row + 1}"
            try:
                text = line.decode("utf-8-sig" if row == 0 else "utf-8")
            except UnicodeDecodeError as error:
                yield bad_record(row, place, f"must be UTF-8: {error.reason}; save the file as UTF-8")
                continue
            if text.strip():
                yield _record(row, place, text)


def read_json(file: Path) -> Iterator[Record]:
    """A JSON array of objects, or, where the file starts with an object, one object a line."""
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(_BOM).lstrip()[:1]
    if start == b"{":
        _refuse_wrapper(file)
        yield from read_jsonl(file)
        return
    text = _whole(file)
    if start != b"[":
        try:
            got = kind(_DECODER.decode(text))
        except ValueError as error:
            raise _broken(file, text, error) from None
        raise ValueError(
            f"{file} must hold a JSON array of objects or one object a line, got {got}; write [{{column: value}}, ...]"
        )
    yield from _read_array(file, text)


def _read_array(file: Path, text: str) -> Iterator[Record]:
    """The array's objects one by one, so that what is wrong with one is told by its line."""
    at, row = _skip(text, text.index("[") + 1), 0
    while text[at : at + 1] != "]" or row:
        place = f"{file} row {row}"
        try:
            values, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            comma = json.JSONDecodeError("a comma stands before the end", text, at)
            raise _broken(file, text, comma if text[at : at + 1] == "]" else error, at=at) from None
        yield _checked(row, place, text[at:end], values)
        at, row = _skip(text, end), row + 1
        mark, at = text[at : at + 1], _skip(text, at + 1)
        if mark == "]":
            break
        if mark != ",":
            raise _broken(file, text, json.JSONDecodeError("Expecting ',' or ']'", text, end))
    else:
        at = _skip(text, at + 1)
    if at < len(text):
        raise _broken(file, text, json.JSONDecodeError("something stands after the array", text, at))


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _record(row: int, place: str, text: str) -> Record:
    try:
        values = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        return bad_record(row, place, f"must be one JSON object a line: {reason}; correct or complete the line")
    except RecursionError:
        return bad_record(row, place, DEEP)
    except _TwiceError as error:
        return bad_record(row, place, f"must name each field once, got {error} twice; remove one of the two")
    except ValueError:
        return bad_record(row, place, "must not hold a number of more than 4300 digits; write it in quotes, as text")
    return _checked(row, place, text, values)


def _checked(row: int, place: str, text: str, values: Any) -> Record:
    if not isinstance(values, dict):
        got = kind(values)
        return bad_record(row, place, f"must be a JSON object, got {got}; write rows as {{column: value}}")
    if "\\ud" in text or "\\uD" in text:  # half of a pair is JSON, and no text that could be written or tokenised
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return bad_record(row, place, f"must hold whole characters, got half of one ({half}); write it anew")
        except RecursionError:
            return bad_record(row, place, DEEP)
    return Record(row, place, values)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _whole(file: Path) -> str:
    data = file.read_bytes()
    _refuse_utf16(data[:2], file)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}:{line} must be UTF-8: {error.reason}; save the file as UTF-8") from None


def _refuse_utf16(start: bytes, file: Path) -> None:
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{file}:1 must be UTF-8, got UTF-16 by its first bytes; save the file as UTF-8")


def _refuse_wrapper(file: Path) -> None:
    """Raise ValueError for a file that is one object over several lines; its rows may be below a key of it."""
    with file.open("rb") as stream:
        first = next((line for line in stream if line.removeprefix(_BOM).strip()), b"").removeprefix(_BOM)
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        pass
    else:
        return
    try:
        values = json.loads(_whole(file))
    except (ValueError, RecursionError):
        return  # one object a line, the first of which is broken: the reader says what is wrong with it
    name = row_list(values)
    if name is not None:
        raise ValueError(
            f"{file} must hold a JSON array of objects or one object a line, got one object with the rows below "
            f"{name!r}; write that list alone: jq '.{name}' {file.name} > rows.json"
        )
    raise ValueError(
        f"{file} must hold a JSON array of objects or one object a line, got one object over several lines; "
        f"write it on one: jq -c . {file.name} > rows.jsonl"
    )


def row_list(values: dict[str, Any]) -> str | None:
    """The name of the field that holds a list of objects, where it is the only one that does."""
    lists = [name for name, value in values.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return str(lists[0]) if len(lists) == 1 else None


def _broken(file: Path, text: str, error: Exception, *, at: int = 0) -> ValueError:
    line = text.count("\n", 0, at) + 1
    if isinstance(error, json.JSONDecodeError):
        return ValueError(f"{file}:{error.lineno} must be valid JSON: {error.msg}; correct or complete the file")
    if isinstance(error, RecursionError):
        return ValueError(f"{file}:{line} {DEEP}")
    if isinstance(error, _TwiceError):
        return ValueError(f"{file}:{line} must name each field once, got {error} twice; remove one of the two")
    long = _LONG_NUMBER.search(text, at)
    line = text.count("\n", 0, long.start()) + 1 if long else line
    return ValueError(f"{file}:{line} must not hold a number of more than 4300 digits; write it in quotes, as text")
