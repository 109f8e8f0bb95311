"""Numbers of a row: margins and weights."""

import math
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


def shown(value: Any) -> str:
    """A value of a row in a refusal: itself if it is short, else what it is."""
    return repr(value) if isinstance(value, int | float | str) and len(repr(value)) < 40 else kind(value)
