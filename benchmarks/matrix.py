"""The equality matrix: every method and quantizer under every strategy against one process.

python -m benchmarks.matrix   writes dsft/matrix.json, and docs/matrix.md from it; 1 if a cell is red
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.groups import COSTS, Crew, Journal, Spec, run
from benchmarks.matrix_rows import OBJECTIVES, chosen, write_rows
from benchmarks.matrix_text import merge, origin
from benchmarks.verdicts import verdict
from dsft.wording import OWN_CONF

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "matrix"
"""Where a run keeps its journal and its rows."""


MODELS = ("tiny", "tiny_moe", "tiny_moe_v3")
FILES = sorted((OWN_CONF / "method").glob("*.yaml"))
BASES = {path.stem: found[1] for path in FILES if (found := re.search(r"/quantization: (\w+)", path.read_text()))}
"""Method -> the quantization that it brings itself."""

METHODS = {path.stem: [f"method={path.stem}"] for path in FILES}
METHODS |= {
    f"{path.stem}+{packing}": [f"method={path.stem}", f"quantization={packing}"]
    for path in FILES if path.stem not in BASES for packing in ("nf4", "int8")
}  # fmt: skip
"""Every method on its own base, and on each packed one unless it brings that itself."""

METHODS |= {
    f"{method}:{objective}": [f"method={method}", f"objective={objective}"]
    for objective in OBJECTIVES for method in ("lora", "qlora", "full")
}  # fmt: skip
"""Each objective with an adapter, with one on a packed base, and with the whole model."""

DROPPING = {"lora+dropout": ["method=lora", "method.dropout=0.1"]}
"""What the tests run beside METHODS, and the matrix does not."""

NEEDED = {f"{model} vera": ["method.rank=8"] for model in MODELS}
NEEDED |= {"tiny_moe ia3": ["method.feedforward_modules=[]"], "tiny qat": ["optim.eps=1e-5"]}
ON_EXPERTS = ["method.target_modules=[all-linear,experts]", "method.expert_rank=3"]
NEEDED |= {"tiny_moe lora_plus": [*ON_EXPERTS, "optim.eps=1e-5"]}
NEEDED |= {f"{model} parallel_adapter": ["method.activation=gelu"] for model in MODELS}
NEEDED |= {f"tiny_moe_v3 {method}": ON_EXPERTS for method in ("lora", "qlora", "int8_lora")}
NEEDED |= {f"{model} full:reward": ["optim.eps=1e-5"] for model in MODELS}
NEEDED |= {f"{model} adalora": ["method.alpha=1024", "method.interval=2"] for model in MODELS}
PRUNED = ["method.density=0.3", "method.gate_start=1", "method.penalty=1e-3"]
NEEDED |= {f"{model} diff_pruning": PRUNED for model in MODELS}
"""Of some cells: shared projections, whole on every rank, that are small beside the model; experts without linears;
adapters of experts, of a rank that torch's kernel does not take; no steps of AdamW along gradients that are but
rounding, where a weight that crosses a level of the grid makes a jump, where the sides of a pair begin alike and the
gradients of their rewards cancel, or at the rates of LoRA+; no corner as relu's, where a number within rounding of 0
has a gradient or none; a start slow by design that 10 steps move; gates of which many are closed, and a penalty that
the norm shows.
"""

RATES = {"adamw": 1e-3, "sgd": 0.05}
LADDER = (1, 5, 10, 30, 100, 300)
"""Multiples of the optimizer's rate. A cell takes the first at which the single process's loss moves."""

PACKED = 1024
"""Tokens of a micro-batch that holds all examples of a rank: two, or four."""

VARIANTS = {
    "none": ["train.gradient_checkpointing=none", "train.global_batch_size=8"],
    "full": ["train.gradient_checkpointing=full", "train.global_batch_size=4"],
}
"""What is computed again in backward. With none, a rank's examples are packed in one micro-batch; with full, each
example is alone in its own, as they always are in the single process."""
UNEVEN = "train.global_batch_size=5"
"""With full, of objectives other than sft: no number of ranks divides it, so that some compute a silent micro-batch."""


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
SIZES = sorted({column.size for column in COLUMNS})

Alone = Mapping[str, Mapping[str, Any]]
"""Optimizer -> row -> what one process measured."""


def needed(row: str) -> list[str]:
    """What of a row's settings is not the method's own."""
    model, method, _ = row.split()
    plain = NEEDED.get(f"{model} {method.partition('+')[0].partition(':')[0]}", [])
    return NEEDED.get(f"{model} {method}", plain)


def words(column: Column, row: str, data: Path) -> tuple[str, ...]:
    """Overrides of a cell, without its rate."""
    model, method, variant = row.split()
    sgd = column.optim == "sgd"
    changed = [word for word in needed(row) if not (sgd and word.startswith("optim.eps="))]  # which SGD has not
    objective = method.partition(":")[2]
    rows_of = chosen(OBJECTIVES[objective], data.parent) if objective else ["data=local", f"data.path={data}"]
    uneven = [UNEVEN] if objective and variant == "full" else []
    return (
        f"model={model}", *(METHODS | DROPPING)[method], *changed, *VARIANTS[variant], *uneven,
        *rows_of, "data.shuffle=false", "train.precision=fp32", "train.steps=10",
        "train.max_length=512", "tracker=[]", f"optim.name={column.optim}", "optim.schedule=constant",
        f"train.max_grad_norm={'inf' if sgd else 1.0}", f"strategy={column.strategy}", *column.extra,
        f"train.micro_batch_tokens={PACKED if variant == 'none' and column.size > 1 else 1}",
    )  # fmt: skip


def rows(
    models: Sequence[str] = MODELS, methods: Sequence[str] = tuple(METHODS), variants: Sequence[str] = tuple(VARIANTS)
) -> list[str]:
    """Rows of the matrix: model, method, recomputation."""
    return [
        f"{model} {method} {variant}"
        for model in models for method in methods for variant in variants if _wanted(model, method, variant)
    ]  # fmt: skip


def _wanted(model: str, method: str, variant: str) -> bool:
    """Whether the matrix has this row: a packed base once, nf4 without recomputation and int8 with it; few of them on
    the experts of a Mixtral, and few methods on those of a DeepSeek, of which each step leaves some without a token.
    """
    name, _, packing = method.partition("+")
    if ":" in method:
        return model == "tiny" and (variant == "full" or name.startswith("lora:"))
    if model == "tiny_moe_v3":
        both = name in ("lora", "qlora", "int8_lora")
        return not packing and (both or (variant == "full" and name in ("full", "houlsby")))
    if model != "tiny":
        return (variant == "full" and not packing) or name in ("lora", "lora_plus", "qlora", "int8_lora")
    return not packing or variant == {"nf4": "none", "int8": "full"}[packing]


def specs(
    pairs: Sequence[tuple[Column, str]], data: Path, alone: Alone | None = None, *, steps: int = Spec.steps
) -> dict[str, Spec]:
    """Name of a cell, COLUMN|ROW -> what is run.

    A process alone looks for the rate that moves its loss, unless alone has it already; the others take that.
    """
    found = {}
    for column, row in pairs:
        taken = (alone or {}).get(column.optim, {}).get(row, {}).get("rate")
        ladder = tuple(RATES[column.optim] * times for times in (LADDER if column.size == 1 else LADDER[:1]))
        found[f"{column.name}|{row}"] = Spec(
            words(column, row, data), ladder if taken is None else (taken,), steps=steps
        )
    return found


def run_columns(
    columns: Sequence[Column], data: Path, *, models: Sequence[str] = MODELS,
    methods: Sequence[str] = tuple(METHODS), variants: Sequence[str] = tuple(VARIANTS), only: Sequence[str] = (),
    alone: Alone | None = None, planted: Sequence[str] = (), fake: bool = False, counted: bool = False,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run the rows of columns of one size in one warm group of processes, or each planted fault in them instead.

    only: rows to run, all if empty. Returns column name -> row -> measured, refused or crashed; with planted faults the
    row's name ends in "!FAULT".
    """
    (size,) = {column.size for column in columns}
    wanted = [row for row in rows(models, methods, variants) if not only or row in only]
    todo = specs([(column, row) for row in wanted for column in columns], data, alone)
    if planted:
        todo = with_faults(todo, planted)
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "cells.jsonl", "")
        return by_column(run(crew(size, fake=fake, counted=counted), todo, journal))


def with_faults(todo: Mapping[str, Spec], planted: Sequence[str]) -> dict[str, Spec]:
    """Each cell with each fault, by the name COLUMN|ROW!FAULT."""
    return {f"{name}!{fault}": replace(spec, fault=fault) for name, spec in todo.items() for fault in planted}


def crew(size: int, *, fake: bool = False, counted: bool = False) -> Crew:
    """Who runs the cells of a column: of one process, two such at a time."""
    return Crew(2, alone=True, counted=counted) if size == 1 else Crew(size, fake=fake, counted=counted)


def by_column(cells: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Column name -> row -> cell."""
    found: dict[str, dict[str, Any]] = {}
    for name, cell in cells.items():
        column, _, row = name.partition("|")
        found.setdefault(column, {})[row] = cell
    return found


def run_alone(
    pairs: Sequence[tuple[Column, str]], data: Path, journal: Journal, *, later: float = 0.0, steps: int = Spec.steps
) -> Alone:
    """Optimizer -> row -> what one process measured, for cells of SINGLE and SINGLE_SGD."""
    found = by_column(run(crew(1), specs(pairs, data, steps=steps), journal, later=later))
    return {column.optim: found[column.name] for column in dict(pairs)}


def told(names: Sequence[str], cells: Mapping[str, Any], code: str) -> dict[str, Any]:
    """What matrix.json keeps of each row whose cells are all there. times: of the optimizer's rate, what was taken;
    seconds: of all its cells, those of one process two at a time.
    """
    found: dict[str, Any] = {}
    for row in names:
        mine = {column: cells.get(f"{column.name}|{row}") for column in (SINGLE, SINGLE_SGD, *COLUMNS)}
        if None in mine.values():
            continue
        alone = {column.optim: mine.pop(column) for column in (SINGLE, SINGLE_SGD)}
        model, method, variant = row.split()
        name, _, packing = method.partition("+")
        name, _, objective = name.partition(":")
        found[row] = {
            "model": model,
            "method": name,
            **({"objective": objective} if objective else {}),
            "quantization": packing or BASES.get(name, "none"),
            "recompute": variant,
            "changed": needed(row),
            "code": code,
            "times": {optim: round(cell["rate"] / RATES[optim]) for optim, cell in alone.items() if "rate" in cell},
            "seconds": round(_seconds(mine) + _seconds(alone) / 2, 1),
            "cells": {column.name: verdict(row, cell, alone[column.optim], column) for column, cell in mine.items()},
        }
    return found


def _seconds(cells: Mapping[Any, Any]) -> float:
    return float(sum(cell["seconds"] for cell in cells.values() if "seconds" in cell))


def measure(names: Sequence[str], data: Path, journal: Journal) -> None:
    """Run what the journal lacks of these rows: alone, then on two processes, then on four."""
    later = len(names) * sum(COSTS[column.size] for column in COLUMNS)
    both = [(column, row) for row in names for column in (SINGLE, SINGLE_SGD)]
    alone = run_alone(both, data, journal, later=later)
    for size in SIZES:
        pairs = [(column, row) for row in names for column in COLUMNS if column.size == size]
        later -= COSTS[size] * len(pairs)
        run(crew(size), specs(pairs, data, alone), journal, later=later)


def _named(row: str) -> tuple[str, str]:
    """Method and objective of a row; the latter empty for sft."""
    method, _, objective = row.split()[1].partition("+")[0].partition(":")
    return method, objective


def main() -> int:
    """Measure the rows that are asked for, put them among the others, write data and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", help="of these methods alone, as lora,ssf: all others stay as they are")
    parser.add_argument("--objectives", help="of these objectives other than sft alone, as dpo,kto")
    parser.add_argument("--resume", action="store_true", help="keep what was measured on this very code")
    args = parser.parse_args()
    chosen = args.methods.split(",") if args.methods else [path.stem for path in FILES]
    if unknown := set(chosen) - {path.stem for path in FILES}:
        parser.error(f"--methods must be names of conf/method, got {', '.join(sorted(unknown))}")
    names = [row for row in rows() if _named(row)[0] in chosen]
    if args.objectives:
        names = [row for row in names if _named(row)[1] in args.objectives.split(",")]
    here = origin()
    FOLDER.mkdir(parents=True, exist_ok=True)
    data, journal = FOLDER / "rows.jsonl", Journal(FOLDER / "cells.jsonl", here["code"])
    write_rows(data, 10)
    journal.forget(names, keep=args.resume)
    try:
        measure(names, data, journal)
    finally:  # asked to stop, too
        code = merge(told(names, journal.read(), here["code"]), here, order=rows())
    return code


if __name__ == "__main__":
    sys.exit(main())
