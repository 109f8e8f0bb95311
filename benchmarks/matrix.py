"""The equality matrix: every method and quantizer under every strategy against one process; writes docs/matrix.md.

python -m benchmarks.matrix [--out docs/matrix.md]
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft_launchers.local import launch

BOUND = 1e-5
"""Largest relative difference of loss and gradient norm to `single`, fp32, 10 steps of AdamW at lr 1e-3."""

MODELS = ("tiny", "tiny_moe")
METHODS = {
    "full": ["method=full"],
    "freeze": ["method=freeze"],
    "lora": ["method=lora"],
    "dora": ["method=dora"],
    "qlora": ["method=qlora"],
    "lora+int8": ["method=lora", "quantization=int8"],
}
RECOMPUTE = ("none", "full")


@dataclass(frozen=True)
class Column:
    """A strategy on a number of processes. copies: whole copies of the model that the ranks together may hold."""

    name: str
    strategy: str
    size: int
    copies: int | None
    extra: tuple[str, ...] = ()
    optim: str = "adamw"


SINGLE = Column("single", "single", 1, None)
COLUMNS = (
    Column("ddp x2", "ddp", 2, None),
    Column("fsdp x2", "fsdp", 2, 1),
    Column("fsdp x4", "fsdp", 4, 1),
    Column("hsdp 2x2", "hsdp", 4, 2, ("strategy.shard_size=2",)),
    Column("zero1 x2", "zero1", 2, None),
    Column("zero2 x2", "zero2", 2, None),
    Column("zero3 x2", "zero3", 2, 1),
    Column("fsdp x2 sgd", "fsdp", 2, 1, optim="sgd"),
)


def cells(column: Column, data: Path, models: tuple[str, ...], methods: tuple[str, ...]) -> dict[str, list[str]]:
    """Cell name -> overrides, for one column."""
    shared = [
        "data=local", f"data.path={data}", "data.shuffle=false", "train.precision=fp32", f"train.steps={10}",
        "train.global_batch_size=4", "train.micro_batch_tokens=300", "train.max_length=512", "tracker=[]",
        f"optim.name={column.optim}", "optim.lr=1e-3", "optim.schedule=constant", f"strategy={column.strategy}",
        "train.max_grad_norm=inf" if column.optim == "sgd" else "train.max_grad_norm=1.0", *column.extra,
    ]  # fmt: skip
    if column.optim == "sgd":
        shared[shared.index("optim.lr=1e-3")] = "optim.lr=0.05"
    return {
        f"{model} {method} {again}": [
            f"model={model}", *METHODS[method], f"train.gradient_checkpointing={again}", *shared,
        ]
        for model in models for method in methods for again in RECOMPUTE
    }  # fmt: skip


def run_column(
    column: Column, data: Path, *, models: tuple[str, ...] = MODELS, methods: tuple[str, ...] = tuple(METHODS),
    planted: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    """Run one column's cells in one warm group of processes; then each once more for each planted fault.

    Returns cell name -> measured or refused; with a planted fault the name ends in "!FAULT".
    """
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "out.json"
        chosen = cells(column, data, models, methods)
        todo: dict[str, Any] = {name: [words, None] for name, words in chosen.items()}
        todo |= {f"{name}!{fault}": [words, fault] for fault in planted for name, words in chosen.items()}
        job.write_text(json.dumps({"cells": todo, "out": str(out)}))
        command = [sys.executable, "-m", "benchmarks.cells", str(job)]
        code = launch(command, num_processes=column.size, log_dir=Path(folder) / "logs", env={"OMP_NUM_THREADS": "1"})
        if code != 0:
            raise RuntimeError(f"column {column.name} ended with {code}: {sorted(Path(folder, 'logs').iterdir())}")
        results: dict[str, Any] = json.loads(out.read_text())
        return results


def difference(cell: dict[str, Any], single: dict[str, Any]) -> float:
    """Largest relative difference of any step's loss or gradient norm; inf if a value is not finite."""
    worst = 0.0
    for key in ("losses", "norms"):
        for mine, theirs in zip(cell[key], single[key], strict=True):
            off = abs(mine - theirs) / abs(theirs)
            worst = max(worst, off if math.isfinite(off) else math.inf)
    return worst


def faults(cell: dict[str, Any], single: dict[str, Any], column: Column) -> list[str]:
    """What keeps a cell from being green; empty if nothing does."""
    found = []
    if difference(cell, single) > BOUND:
        found.append(f"differs by {difference(cell, single):.1e}")
    if column.copies and cell["base_bytes"] > 1.1 * column.copies * single["base_bytes"]:
        found.append(f"holds {cell['base_bytes'] / single['base_bytes']:.2f} x the model")
    moved = abs(single["losses"][0] - single["losses"][-1]) / single["losses"][0]
    if moved < 0.01:
        found.append(f"proves nothing: the loss moves by {moved:.1%}")
    if column.size > 1 and cell["label_ratio"] < 2:
        found.append(f"proves nothing: label counts differ by {cell['label_ratio']:.1f} x")
    return found


def main() -> int:
    """Run all columns, write the table; 1 if a cell is red."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/matrix.md"))
    args = parser.parse_args()
    started = time.monotonic()
    from benchmarks.cells import write_rows

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, 10)
        single = {
            optim: run_column(Column("single", "single", 1, None, optim=optim), data) for optim in ("adamw", "sgd")
        }
        table = {}
        for column in COLUMNS:
            table[column] = run_column(column, data)
            print(f"{column.name}: {time.monotonic() - started:.0f} s", flush=True)
    red = write_table(args.out, single, table, time.monotonic() - started)
    print(args.out.read_text())
    return 1 if red else 0


def write_table(
    out: Path, single: dict[str, dict[str, Any]], table: dict[Column, dict[str, Any]], seconds: float
) -> int:
    """Write the table; returns the number of red cells."""
    red, reasons, worst = 0, [], 0.0
    lines = ["| model, method, recompute | " + " | ".join(column.name for column in table) + " |"]
    lines += ["|---|" + "---|" * len(table)]
    for name in single["adamw"]:
        row = []
        for column, results in table.items():
            cell, alone = results[name], single[column.optim][name]
            if "refused" in cell:
                red += 1  # no combination of this table is meant to be refused
                row.append("**RED** refused")
                reasons.append(f"{name}, {column.name}: {cell['refused']}")
                continue
            off, wrong = difference(cell, alone), faults(cell, alone, column)
            worst = max(worst, off)
            red += bool(wrong)
            row.append(f"**RED** {'; '.join(wrong)}" if wrong else f"{off:.0e}")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    head = [
        "# The equality matrix",
        "",
        "Largest relative difference of loss and of gradient norm to one process over 10 steps: fp32, AdamW at lr",
        "1e-3 (the sgd column: 0.05), constant rate, dropout 0, global batch 4, micro-batches of 300 tokens. In every",
        "cell the label counts of the ranks differ by 2 x or more and the loss moves by 1 % or more. A sharding cell",
        "is green only if the ranks together hold at most 1.1 x the model (hsdp: 1.1 x its two copies) after step 1.",
        f"Bound {BOUND:g}; largest {worst:.1e}; red cells: {red}. Made by `make matrix` in {seconds / 60:.1f} minutes",
        f"on {os.cpu_count()} cores at commit {_commit()}.",
        "",
    ]
    out.write_text("\n".join([*head, *lines, "", *reasons]).rstrip() + "\n")
    return red


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
