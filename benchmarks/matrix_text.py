"""The equality matrix as a page, docs/matrix.md, and as data, dsft/matrix.json."""

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import here

BOUND = 1e-5
"""Largest relative difference of loss and gradient norm to `single`, fp32, 10 steps of AdamW at lr 1e-3."""

DATA = Path(__file__).parents[1] / "dsft" / "matrix.json"

HEAD = """\
# The equality matrix

Largest relative difference of loss and of gradient norm to one process over 10 steps: fp32, AdamW at lr
1e-3 (the sgd column: 0.05; vera 30, ia3 10, p_tuning_v2 5 times that), constant rate, dropout 0. none: nothing is
computed again in backward; global batch 8, a rank's two or four examples in one micro-batch. full: every
block is; global batch 4, each example in a micro-batch of its own, as all are in the one process that a cell
is compared to. In every cell the label counts of the ranks differ by 2 x or more and the loss moves by 1 %
or more. A sharding cell is green only if the ranks together hold at most 1.1 x the model (hsdp: 1.1 x its
two copies) after step 1.
"""


def write(found: dict[str, dict[str, dict[str, Any]]], page: Path, seconds: float) -> int:
    """Write page and data; 1 if a cell is red. found: row -> column -> off, refused or red."""
    cells = [cell for row in found.values() for cell in row.values()]
    worst = max((cell["off"] for cell in cells if "off" in cell), default=0.0)
    red = sum("red" in cell for cell in cells)
    reasons = sorted({cell["refused"] for cell in cells if "refused" in cell})
    columns = list(next(iter(found.values())))
    table = ["| model, method, recompute | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, row in found.items():
        table.append(f"| {name} | " + " | ".join(_shown(cell, reasons) for cell in row.values()) + " |")
    notes = [f"[{index}] refused: {reason}\n" for index, reason in enumerate(reasons, start=1)]
    made = (
        f"Bound {BOUND:g}; largest {worst:.1e}; red cells: {red}. Made by `make matrix` in {seconds / 60:.1f} minutes\n"
        f"on {here()}.\n"
    )
    page.write_text("\n".join([HEAD + made, *table, "", *notes]).rstrip() + "\n")
    DATA.write_text(json.dumps({"bound": BOUND, "cells": found}, indent=1) + "\n")
    print(page.read_text())
    return int(red > 0)


def _shown(cell: dict[str, Any], reasons: list[str]) -> str:
    if "refused" in cell:
        return f"[{reasons.index(cell['refused']) + 1}]"
    return f"**RED** {cell['red']}" if "red" in cell else f"{cell['off']:.0e}"
