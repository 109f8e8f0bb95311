"""What the table of families says of a row: right in which columns, refused why, or what is wrong with it."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.families_text import BOUNDS, DOUBLE, DOUBLES, ONE, RANKS, ROUNDING
from benchmarks.family_shapes import Kind
from benchmarks.verdicts import differences

OWN = "own attention"


def row_of(kind: Kind, methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The row. methods: method -> column of processes -> what a cell gave."""
    families = [cells[ONE]["family"] for cells in methods.values() if "family" in cells[ONE]]
    family = families[0] if families else {}
    said = [cells[ONE].get("refused") or cells[ONE].get("unmade") or "" for cells in methods.values()]
    return {
        "model_type": kind.model_type,
        "changed": dict(kind.changes),
        "verdict": _word(family) if family else "refused" if any("refused" in c[ONE] for c in methods.values()) else "",
        "reason": family["reason"] if family else max(said, key=len),
        "seconds": round(sum(cell.get("seconds", 0.0) for cells in methods.values() for cell in cells.values()), 1),
        "methods": {method: _method(kind, cells) for method, cells in methods.items()},
    }


def _word(family: Mapping[str, Any]) -> str:
    if family["packs"]:
        return "packs"
    return "alone" if family["attention"] == "dsft_ragged" else OWN


def _method(kind: Kind, cells: Mapping[str, Any]) -> dict[str, Any]:
    """Column -> verdict, or {"refused": why}, {"unmade": why}, {"red": why}."""
    single = cells[ONE]
    for word in ("refused", "unmade"):
        if word in single:
            return {word: single[word]}
    if "crashed" in single:
        return {"red": f"after the weights were read: {single['crashed']}"}
    return dict(_verdicts(kind, single, cells))


def _verdicts(kind: Kind, single: Mapping[str, Any], cells: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for column, bound in BOUNDS.items():
        if column in RANKS:
            yield column, _on_ranks(cells.get(column), single, bound, _double(cells, column))
        elif column not in single:
            yield column, {"none": "random" if kind.drops and column == "plain" else "not computed again"}
        elif isinstance(single[column], dict):
            yield column, {"red": single[column]["failed"]}
        elif column == "plain" and DOUBLE in cells and not single[column] <= bound:
            yield column, _rounded(single[column], cells[DOUBLE].get("plain"))
        else:
            yield column, _held(single[column], bound)


def _rounded(off: float, double: Any) -> dict[str, Any]:
    """off, beyond its bound in fp32, with what it is in float64; red where that is no rounding either."""
    if off == float("inf"):  # no number, on ranks or alone
        return {"red": "differs by inf"}
    if not isinstance(double, float):
        return {"red": f"differs by {off:.1e}, and gives nothing in float64"}
    said = _held(double, ROUNDING)
    if "red" in said:
        return {"red": f"differs by {off:.1e}, and by {double:.1e} in float64"}
    return {"off": float(f"{off:.1e}"), "double": said["off"]}


def _double(cells: Mapping[str, Any], column: str) -> float | None:
    """How far two ranks are from one process in float64, if both were run."""
    one, two = cells.get(DOUBLE, {}), cells.get(DOUBLES[column], {})
    return max(differences(two, one)) if "losses" in one and "losses" in two else None


def _on_ranks(
    cell: Mapping[str, Any] | None, single: Mapping[str, Any], bound: float, double: float | None
) -> dict[str, Any]:
    if cell is None:
        return {"none": "not run"}
    if "refused" in cell:
        return {"none": "refused", "why": cell["refused"]}
    if "crashed" in cell:
        return {"red": cell["crashed"]}
    off = max(differences(cell, single))
    return _held(off, bound) if off <= bound or double is None else _rounded(off, double)


def _held(off: float, bound: float) -> dict[str, Any]:
    """off, or red where it is beyond the bound (or is no number)."""
    return {"off": float(f"{off:.1e}")} if off <= bound else {"red": f"differs by {off:.1e}"}
