"""What the equality matrix (matrix.json beside this file, written by `make matrix`) says of a combination; no torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsft.config import Run

MATRIX = Path(__file__).with_name("matrix.json")
PAGE = "docs/matrix.md"
OWN = "sft"
"""The objective of rows that name none."""


def proven(run: Run, names: Mapping[str, str], theirs: Mapping[str, str], *, experts: bool) -> str | None:
    """One line; None of one process, which all others are compared to.

    names: group -> option; theirs: those of them that are not ours, which the matrix does not know whatever their name;
    experts: whether the model has them. The matrix is of our smallest models; the line says which settings of its row
    are not the method's own.
    """
    if names["strategy"] == "single":
        return None
    asked = {
        "model": "tiny_moe" if experts else "tiny",
        **{group: names[group] for group in ("method", "quantization", "objective")},
        "recompute": run.train.gradient_checkpointing,
    }
    shown = [value for group, value in asked.items() if (group, value) != ("objective", OWN)]
    what = " ".join(shown) + f" under {names['strategy']}"
    groups = ("method", "quantization", "objective", "strategy")
    if foreign := [f"{group}={names[group]}" for group in groups if group in theirs]:
        return f"not in the matrix: {foreign[0]} is not dsft's own"
    rows = json.loads(MATRIX.read_text(encoding="utf-8"))["rows"].values()
    row = next((row for row in rows if asked.items() <= {"objective": OWN, **row}.items()), None)
    cells = {name: cell for name, cell in row["cells"].items() if name.split()[0] == names["strategy"]} if row else {}
    return f"{_said(cells, row['changed'])}: {what}" if row and cells else f"not in the matrix: {what}"


def _said(cells: Mapping[str, Any], changed: Sequence[str]) -> str:
    """Of the columns of one strategy, the worst. changed: settings that are not the method's own."""
    for kind in ("red", "refused"):
        if found := [f"{kind} in {PAGE}, {cell[kind]}" for cell in cells.values() if kind in cell]:
            return found[0]
    worst = max(cell["off"] for cell in cells.values())
    settings = " ".join(changed) or "the method's defaults"
    return f"equal to one process within {worst:.0e} ({PAGE}), {settings} in fp32"
