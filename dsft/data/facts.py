"""The audit states these facts of a set of rows before a run learns from them."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dsft.data.encoded import Encoded
from dsft.data.skipped import NAME

if TYPE_CHECKING:
    from dsft.objective import Wants

_MOST = 10
"""Labels that are named, the most frequent ones."""


def facts(
    wants: "Wants", kept: Sequence[Encoded], columns: Sequence[Mapping[str, float]], labels: Sequence[str] | None
) -> list[str]:
    """Lines about the rows to learn from. Raises ValueError if all of them have one label: nothing could be learned."""
    lines = []
    if wants == "pair":
        longer = sum(row.segments[0] > row.segments[1] for row in kept)
        lines.append(f"the chosen answer is the longer one in {100 * longer / len(kept):.0f} % of the pairs")
    if wants in ("rated", "labelled"):
        names = ["false", "true"] if wants == "rated" else labels
        found = [int(each["label"]) for each in columns]
        lines.append(_labels(found, names, numbered=wants == "labelled"))
        lines += _warnings(kept, found, names if wants == "labelled" else None)
    weights = [each.get("weight", 1.0) for each in columns]
    if any(weight != 1 for weight in weights):
        mean = sum(weights) / len(weights)
        lines.append(f"weights of rows: from {min(weights):g} to {max(weights):g}, {mean:.3g} on average")
    return lines


def _warnings(kept: Sequence[Encoded], found: Sequence[int], names: Sequence[str] | None) -> Iterator[str]:
    """Lines about a label that no row has, and about rows that differ in nothing but their label."""
    there = set(found)
    absent = [name for number, name in enumerate(names or ()) if number not in there]
    if absent:
        yield (
            f"warning: no row that is kept has the label {', '.join(absent[:_MOST])}, which data.labels lists: nothing "
            f"teaches it; the rows that are left out, and why, stand in {NAME}"
        )
    first: dict[bytes, int] = {}
    others = sum(
        first.setdefault(hashlib.blake2b(row.tokens.tobytes(), digest_size=16).digest(), label) != label
        for row, label in zip(kept, found, strict=True)
    )
    if others:
        rows = "row has" if others == 1 else "rows have"
        yield f"warning: {others} {rows} the text of an earlier row and another label"


def _labels(found: Sequence[int], names: Sequence[str] | None, *, numbered: bool) -> str:
    """The shares of the labels in words."""

    def name(label: int) -> str:
        number = f"{label} " if numbered and names else ""
        return f"{number}{names[label] if names else label}"

    counts = Counter(found)
    if len(counts) == 1:
        raise ValueError(
            f"the training data must have rows of two labels or more, got {name(found[0])} in all {len(found)} rows; "
            "there is nothing to tell apart: add others or correct the column of the label"
        )
    shares = [f"{name(label)} {100 * count / len(found):.1f} %" for label, count in counts.most_common(_MOST)]
    more = f", and {len(counts) - _MOST} others" if len(counts) > _MOST else ""
    return f"labels: {', '.join(shares)}{more}"
