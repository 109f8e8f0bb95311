"""Rows as they lie in a file or a dataset, before their columns are understood."""

from typing import Any, NamedTuple


class Record(NamedTuple):
    """One row as it lies in the file. row is zero-based; for jsonl it is the line's index, blank lines included.

    fault: one line that says why the row cannot be read, and what to do; empty for a row that can. Its values are {}.
    """

    row: int
    place: str
    values: dict[str, Any]
    fault: str = ""


class RowError(ValueError):
    """A row that cannot be used: its text is one line with the place, what is wrong and the way out."""


def bad_record(row: int, place: str, reason: str) -> Record:
    """The Record of a row that cannot be read; reason goes on after the place."""
    return Record(row, place, {}, f"{place} {reason}")


def check_names(names: list[str], place: str) -> None:
    """Raise ValueError if a column stands twice: only one of the two could be read."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        shown = twice or "a column without a name"
        raise ValueError(f"{place} must name each column once, got {shown} twice; rename or remove one of the two")


def without_nulls(value: Any) -> Any:
    """A value of a table without the null fields of its structs, which stand for what only other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def table_values(values: dict[str, Any]) -> dict[str, Any]:
    """A row of a table whose columns all stay, and whose structs lose their null fields."""
    return {name: without_nulls(value) for name, value in values.items()}


def kind(value: Any) -> str:
    """What a value is called in a refusal: null for None, else its Python type."""
    return "null" if value is None else type(value).__name__


def field_names(values: Any) -> str:
    """The fields of a row or a turn in words."""
    if not isinstance(values, dict):
        return kind(values)
    return "the fields " + ", ".join(str(name) or "(without a name)" for name in values) if values else "no field"
