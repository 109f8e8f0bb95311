"""The table of families: every causal language model class of transformers, trained small by dsft and by others.

python -m benchmarks.families   writes dsft/families.json, and docs/families.md from it; 1 if a cell is red
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.families_text import CODE, METHODS, ONE, RANKS, merge
from benchmarks.family_cells import FamilySpec, write_rows
from benchmarks.family_models import kind, names
from benchmarks.family_verdicts import row_of
from benchmarks.groups import Crew, Journal, run
from benchmarks.matrix_text import origin

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "families"
"""Where a run keeps its journal, its models and its rows."""

PROGRAM = "benchmarks.family_cells"
HUNG_S = {1: 300.0, 2: 120.0}


def specs(chosen: Sequence[str], column: str, folder: Path = FOLDER) -> dict[str, FamilySpec]:
    """Name of a cell, COLUMN|NAME METHOD -> what is run. column: single, or a strategy with a number of ranks."""
    strategy = column.split()[0]
    return {
        f"{column}|{name} {method}": FamilySpec(name, method, strategy, str(folder))
        for method in METHODS
        for name in chosen
    }


def measure(chosen: Sequence[str], journal: Journal, jobs: int, *, ranks: bool) -> None:
    """Run what the journal lacks of these rows: in single processes, jobs at a time, then on two ranks."""
    single = run(Crew(jobs, alone=True, program=PROGRAM, hung=HUNG_S[1]), specs(chosen, ONE), journal)
    for column in RANKS if ranks else ():
        todo = specs(chosen, column)
        runs = {name: spec for name, spec in todo.items() if "losses" in single[f"{ONE}|{name.partition('|')[2]}"]}
        run(Crew(2, program=PROGRAM, hung=HUNG_S[2]), runs, journal)


def told(chosen: Sequence[str], cells: Mapping[str, Any], code: str) -> dict[str, Any]:
    """What families.json keeps of each row that ran under a method at least."""
    found = {}
    for name in chosen:
        methods = {method: mine for method in METHODS if ONE in (mine := _columns(name, method, cells))}
        if methods:
            found[name] = {**row_of(kind(name), methods), "code": code}
    return found


def _columns(name: str, method: str, cells: Mapping[str, Any]) -> dict[str, Any]:
    found = ((column, cells.get(f"{column}|{name} {method}")) for column in (ONE, *RANKS))
    return {column: cell for column, cell in found if cell is not None}


def main() -> int:
    """Measure the rows that are asked for, put them among the others, write data and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="these rows alone, as llama,gemma2: all others stay as they are")
    parser.add_argument("--anew", action="store_true", help="measure again what was measured on this very code")
    parser.add_argument("--jobs", type=int, default=2, help="single processes at a time")
    parser.add_argument("--no-ranks", action="store_true", help="leave out the columns of two ranks")
    args = parser.parse_args()
    every = names()
    chosen = args.only.split(",") if args.only else every
    if unknown := sorted(set(chosen) - set(every)):
        parser.error(f"--only must be model types of transformers or rows of VARIANTS, got {', '.join(unknown)}")
    here = origin(CODE)
    FOLDER.mkdir(parents=True, exist_ok=True)
    journal = Journal(FOLDER / "cells.jsonl", here["code"])
    write_rows(FOLDER / "rows.jsonl")
    journal.forget([f"{name} {method}" for name in chosen for method in METHODS], keep=not args.anew)
    try:
        measure(chosen, journal, args.jobs, ranks=not args.no_ranks)
    finally:  # asked to stop, too
        code = merge(told(chosen, journal.read(), here["code"]), here, order=every)
    return code


if __name__ == "__main__":
    sys.exit(main())
