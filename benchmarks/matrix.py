"""The equality matrix: every method and quantizer under every strategy against one process.

python -m benchmarks.matrix [--out docs/matrix.md]   writes dsft/matrix.json as well
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft_launchers.local import launch

from benchmarks.matrix_text import BOUND, write
from dsft.wording import OWN_CONF

MODELS = ("tiny", "tiny_moe")
FILES = sorted((OWN_CONF / "method").glob("*.yaml"))
METHODS = {path.stem: [f"method={path.stem}"] for path in FILES}
METHODS |= {
    f"{path.stem}+{packing}": [f"method={path.stem}", f"quantization={packing}"]
    for path in FILES if "/quantization" not in path.read_text() for packing in ("nf4", "int8")
}  # fmt: skip
"""Every method on its own base, and on each packed one unless it brings that itself."""

NEEDED = {"tiny vera": ["method.rank=16"], "tiny_moe vera": ["method.rank=16"]}
NEEDED |= {"tiny_moe ia3": ["method.feedforward_modules=[]"]}
NEEDED |= {f"{model} adalora": ["method.alpha=1024", "method.interval=2"] for model in MODELS}
NEEDED |= {
    f"{model} diff_pruning": ["method.density=0.3", "method.gate_start=1", "method.penalty=1e-3"] for model in MODELS
}
"""Of some cells: shared projections, whole on every rank, that are small beside the model; experts without linears; a
start slow by design that 10 steps move; gates of which many are closed, and a penalty that the norm shows.
"""

FASTER = {"vera": 30, "ia3": 10, "p_tuning_v2": 5, "prompt": 100}
"""Methods that want a higher rate, and how much of it: their loss would hardly move."""

PACKED = 1024
"""Tokens of a micro-batch that holds all examples of a rank: two, or four."""

VARIANTS = {
    "none": ["train.gradient_checkpointing=none", "train.global_batch_size=8"],
    "full": ["train.gradient_checkpointing=full", "train.global_batch_size=4"],
}
"""What is computed again in backward. With none, a rank's examples are packed in one micro-batch; with full, each
example is alone in its own, as they always are in the single process."""


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
SINGLE_SGD = Column("single sgd", "single", 1, None, optim="sgd")
COLUMNS = (
    Column("ddp x2", "ddp", 2, None),
    Column("fsdp x2", "fsdp", 2, 1),
    Column("fsdp x4", "fsdp", 4, 1),
    Column("hsdp 2x2", "hsdp", 4, 2, ("strategy.shard_size=2",)),
    Column("zero1 x2", "zero1", 2, None),
    Column("zero2 x2", "zero2", 2, None),
    Column("zero3 x2", "zero3", 2, 1),
    Column("fsdp x2 kept sgd", "fsdp", 2, 1, ("strategy.keep_unsharded=true",), optim="sgd"),
)


def cells(
    column: Column, data: Path, models: tuple[str, ...], methods: tuple[str, ...], variants: tuple[str, ...]
) -> dict[str, list[str]]:
    """Cell name -> overrides, for one column."""
    sgd = column.optim == "sgd"
    rate = 0.05 if sgd else 1e-3
    shared = [
        "data=local", f"data.path={data}", "data.shuffle=false", "train.precision=fp32", "train.steps=10",
        "train.max_length=512", "tracker=[]",
        f"optim.name={column.optim}", "optim.schedule=constant",
        f"train.max_grad_norm={'inf' if sgd else 1.0}", f"strategy={column.strategy}", *column.extra,
    ]  # fmt: skip
    return {
        f"{model} {method} {variant}": [
            f"model={model}", *METHODS[method], *_needed(model, method), *VARIANTS[variant], *shared,
            f"optim.lr={rate * FASTER.get(method.partition('+')[0], 1)}",
            f"train.micro_batch_tokens={PACKED if variant == 'none' and column.size > 1 else 1}",
        ]
        for model in models for method in methods for variant in variants if wanted(model, method, variant)
    }  # fmt: skip


def _needed(model: str, method: str) -> list[str]:
    return NEEDED.get(f"{model} {method.partition('+')[0]}", [])


def wanted(model: str, method: str, variant: str) -> bool:
    """Whether the matrix has this row: a packed base once, nf4 without recomputation and int8 with it; few of them on
    the experts, which stay as they are.
    """
    name, _, packing = method.partition("+")
    if model != "tiny":
        return (variant == "full" and not packing) or name in ("lora", "qlora", "int8_lora")
    return not packing or variant == {"nf4": "none", "int8": "full"}[packing]


def run_columns(
    columns: Sequence[Column], data: Path, *, models: tuple[str, ...] = MODELS,
    methods: tuple[str, ...] = tuple(METHODS), variants: tuple[str, ...] = tuple(VARIANTS), only: tuple[str, ...] = (),
    planted: tuple[str, ...] = (), fake: bool = False,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run the cells of columns of one size in one warm group of processes, or each planted fault in them instead.

    only: names of the cells to run, all if empty. fake: one process plays rank 0 of the group; its collectives are
    those of a real one, its numbers are not.

    Returns column name -> cell name -> measured or refused; with planted faults the cell's name ends in "!FAULT".
    """
    (size,) = {column.size for column in columns}
    todo: dict[str, Any] = {}
    for column in columns:
        for name, words in cells(column, data, models, methods, variants).items():
            if only and name not in only:
                continue
            for fault in planted or (None,):
                todo[f"{column.name}|{name}{f'!{fault}' if fault else ''}"] = [words, fault]
    measured = run_cells(todo, size, fake=fake)
    results: dict[str, dict[str, Any]] = {column.name: {} for column in columns}
    for name, cell in measured.items():
        results[name.split("|")[0]][name.split("|")[1]] = cell
    return results


def run_cells(todo: Mapping[str, Any], size: int, *, fake: bool = False) -> dict[str, Any]:
    """Run cells {name: [overrides, planted fault or None]} in one warm group of size processes; what each measured."""
    with tempfile.TemporaryDirectory() as folder:
        job, out, logs = (Path(folder) / name for name in ("job.json", "out.json", "logs"))
        job.write_text(json.dumps({"cells": todo, "out": str(out), "fake": size if fake else 0}))
        command = [sys.executable, "-m", "benchmarks.cells", str(job)]
        code = launch(command, num_processes=1 if fake else size, log_dir=logs, env={"OMP_NUM_THREADS": "1"})
        if code != 0:
            raise RuntimeError(f"{', '.join(todo)} ended with {code}: {_tail(logs)}")
        measured: dict[str, Any] = json.loads(out.read_text())
    return measured


def _tail(logs: Path) -> str:
    return "\n".join(path.read_text()[-1500:] for path in sorted(logs.iterdir()))


def difference(cell: dict[str, Any], single: dict[str, Any]) -> float:
    """Largest relative difference of any step's loss or gradient norm; inf if a value is not finite.

    A planted fault's cell has fewer steps, and is compared in those.
    """
    worst = 0.0
    for key in ("losses", "norms"):
        for mine, theirs in zip(cell[key], single[key], strict=False):
            off = abs(mine - theirs) / abs(theirs)
            worst = max(worst, off if math.isfinite(off) else math.inf)
    return worst


def faults(name: str, cell: dict[str, Any], single: dict[str, Any], column: Column) -> list[str]:
    """What keeps a cell from being green; empty if nothing does."""
    found = []
    if difference(cell, single) > BOUND:
        found.append(f"differs by {difference(cell, single):.1e}")
    if column.copies and cell["base_bytes"] > 1.1 * column.copies * single["base_bytes"]:
        found.append(f"holds {cell['base_bytes'] / single['base_bytes']:.2f} x the model")
    moved = abs(single["losses"][0] - single["losses"][-1]) / single["losses"][0]
    if moved < 0.01:
        found.append(f"proves nothing: the loss moves by {moved:.1%}")
    if single["examples"][1] > 1 or (name.endswith(" none") and column.size > 1 and cell["examples"][0] < 2):
        found.append("proves nothing: the single process packed, or a rank did not")
    if column.size > 1 and cell["label_ratio"] < 2:
        found.append(f"proves nothing: label counts differ by {cell['label_ratio']:.1f} x")
    return found


def verdict(name: str, cell: dict[str, Any], single: dict[str, Any], column: Column) -> dict[str, Any]:
    """What the matrix says of a cell: {"off": difference}, {"refused": reason} or {"red": what is wrong}."""
    if "refused" in cell:
        return {"refused": cell["refused"]}
    wrong = faults(name, cell, single, column)
    return {"red": "; ".join(wrong)} if wrong else {"off": difference(cell, single)}


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
        alone = run_columns((SINGLE, SINGLE_SGD), data)
        results: dict[str, dict[str, Any]] = {}
        for size in sorted({column.size for column in COLUMNS}):
            results |= run_columns([column for column in COLUMNS if column.size == size], data)
            print(f"{size} processes: {time.monotonic() - started:.0f} s", flush=True)
    single = {SINGLE.optim: alone[SINGLE.name], SINGLE_SGD.optim: alone[SINGLE_SGD.name]}
    table = {column: results[column.name] for column in COLUMNS}
    found = {
        name: {column.name: verdict(name, results[name], single[column.optim][name], column)
               for column, results in table.items()}
        for name in single["adamw"]
    }  # fmt: skip
    return write(found, args.out, time.monotonic() - started)


if __name__ == "__main__":
    sys.exit(main())
