"""What the equality matrix says of a cell: equal to one process, refused, or what is wrong with it."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.cells import MOVES
from benchmarks.matrix_rows import OBJECTIVES
from benchmarks.matrix_text import BOUND

if TYPE_CHECKING:
    from benchmarks.matrix import Column

TIE = 1e-6
"""Of a router's logits, which are about 1: their rounding in fp32 is some 1e-7, and seldom more than this."""

MOST_TIES = 2
"""Steps of a cell that may be left out for it."""


def differences(cell: Mapping[str, Any], single: Mapping[str, Any]) -> list[float]:
    """Of each step the larger relative difference of loss and gradient norm; inf if one is not finite.

    A planted fault's cell has fewer steps, and is compared in those.
    """
    found = []
    for mine in zip(cell["losses"], cell["norms"], single["losses"], single["norms"], strict=False):
        off = max(abs(mine[0] - mine[2]) / abs(mine[2]), abs(mine[1] - mine[3]) / abs(mine[3]))
        found.append(off if all(map(math.isfinite, mine)) else math.inf)
    return found


def difference(cell: Mapping[str, Any], single: Mapping[str, Any]) -> float:
    """The largest of all steps but ties."""
    left_out = ties(cell, single)
    return max((off for step, off in enumerate(differences(cell, single), 1) if step not in left_out), default=0.0)


def ties(cell: Mapping[str, Any], single: Mapping[str, Any]) -> list[int]:
    """Steps that differ where in the single process a router was within rounding of another choice."""
    steps = enumerate(zip(differences(cell, single), single["gaps"], strict=False), start=1)
    return [step for step, (off, gap) in steps if off > BOUND and gap < TIE]


def faults(row: str, cell: Mapping[str, Any], single: Mapping[str, Any], column: "Column") -> Iterator[str]:
    """What keeps a cell from being green; nothing if nothing does."""
    if len(ties(cell, single)) > MOST_TIES:
        yield f"differs in {len(ties(cell, single))} steps in which a router was near another choice"
    if difference(cell, single) > BOUND:
        yield f"differs by {difference(cell, single):.1e}"
    if column.copies and cell["base_bytes"] > 1.1 * column.copies * single["base_bytes"]:
        yield f"holds {cell['base_bytes'] / single['base_bytes']:.2f} x the model"
    if (moved := abs(single["losses"][0] - single["losses"][-1]) / single["losses"][0]) < MOVES:
        yield f"proves nothing: the loss moves by {moved:.1%}"
    if single["examples"][1] > 1 or (row.endswith(" none") and column.size > 1 and cell["examples"][0] < 2):
        yield "proves nothing: the single process packed, or a rank did not"
    # Of labelled rows in batches of eight each rank has as many: there the cell shows that packing changes nothing.
    even = row.endswith(" none") and OBJECTIVES.get(row.split()[1].partition(":")[2]) == "labelled"
    if (
        column.size > 1 and not even and cell["label_ratio"] < (1.5 if ":" in row else 2)
    ):  # of 5 pairs two ranks have 3 and 2
        yield f"proves nothing: label counts differ by {cell['label_ratio']:.1f} x"


def verdict(row: str, cell: Mapping[str, Any], single: Mapping[str, Any], column: "Column") -> dict[str, Any]:
    """What the matrix says of a cell: off = difference, refused = reason (by = whose word), or red = what is wrong."""
    if "crashed" in cell or "crashed" in single:
        return {"red": cell.get("crashed") or f"one process: {single['crashed']}"}
    if "refused" in cell:
        return dict(cell)
    if "refused" in single:
        return {"red": f"runs, and one process is refused: {single['refused']}"}
    wrong = "; ".join(faults(row, cell, single, column))
    if wrong:
        return {"red": wrong}
    left_out = ties(cell, single)
    return {"off": float(f"{difference(cell, single):.1e}"), **({"ties": left_out} if left_out else {})}
