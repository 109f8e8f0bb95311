"""Numbers of a row: margins, weights, verdicts and the numbers of classes."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from dsft.data.records import RowError, kind


def finite(value: Any, place: str, column: str, *, absent: float) -> float:
    """The number that a column holds, as one or as text (csv); absent where it holds nothing. Raises RowError."""
    if value is None or value == "":
        return absent
    try:
        found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise RowError(f"{place} must have a finite number in the field {column}, got {shown(value)}; correct the row")
    return found


def weight(value: Any, place: str) -> float:
    """How much a row counts, 0 or more; 1 where it does not say. Raises RowError."""
    found = finite(value, place, "weight", absent=1.0)
    if found < 0:
        raise RowError(
            f"{place} must have a number of 0 or more in the field weight, got {shown(value)}; correct the row"
        )
    return found


def verdict(value: Any, place: str) -> float:
    """1 for a good answer, 0 for a bad one: true and false, 1 and 0, as such or as text. Raises RowError."""
    known = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}
    text = str(value).strip().lower() if isinstance(value, bool | int | float | str) else ""
    if text not in known:
        raise RowError(
            f"{place} must have true or false (or 1, 0) in the field label, got {shown(value)}; correct the row"
        )
    return known[text]


def class_of(value: Any, labels: Sequence[str] | None, place: str) -> float:
    """The number of a row's class: its place in labels if they have its name, else itself. Raises RowError.

    Labels that are numbers themselves are names alone: the number 1 is not the second of [1, 2, 3]. So are true and
    false where labels are listed.
    """
    text = str(value).strip() if isinstance(value, bool | int | float | str) else ""
    text = text.lower() if isinstance(value, bool) else text
    if labels is not None and text in labels:
        return float(labels.index(text))
    number = None if labels is not None and isinstance(value, bool) else _whole(value)
    numbered = labels is not None and any(_whole(name) is not None for name in labels)
    if number is None or number < 0 or (labels is not None and (numbered or number >= len(labels))):
        known = "a whole number of 0 or more" if labels is None else f"one of data.labels ({_few(labels)})"
        raise RowError(
            f"{place} must have {known} in the field label, got {shown(value)}; correct the row or data.labels"
        )
    return float(number)


def names_of(labels: Sequence[str | bool | int] | None) -> list[str] | None:
    """Labels as they are listed, as words: true and false are YAML's."""
    if labels is None:
        return None
    return [str(label).lower() if isinstance(label, bool) else str(label) for label in labels]


def is_name(value: Any) -> bool:
    """True for a label that is a word and no number."""
    return isinstance(value, str) and value.strip() != "" and _whole(value) is None


def unlisted(values: Iterable[Any], path: str) -> ValueError:
    """The refusal of labels that are words, while nothing says which number each has."""
    found = {value.strip(): None for value in values if is_name(value)}
    return ValueError(
        f"data.labels must list the labels of {path}, whose places are their numbers, as they are text, got null; set "
        f"data.labels=[{_few(sorted(found), joint=',')}]"
    )


def _whole(value: Any) -> int | None:
    """The whole number that a value is, as text too; None if it is none."""
    try:
        number = float(value) if isinstance(value, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return int(number) if math.isfinite(number) and number == int(number) else None


def _few(names: Sequence[str], joint: str = " ") -> str:
    """Up to ten names."""
    return joint.join([*names[:10], *(["..."] if len(names) > 10 else [])])


def shown(value: Any) -> str:
    """A value of a row in a refusal: itself if it is short, else what it is."""
    return repr(value) if isinstance(value, int | float | str) and len(repr(value)) < 40 else kind(value)
