"""The table of families: every causal language model class of transformers, trained small by dsft and by others.

python -m benchmarks.families   writes dsft/families.json, and docs/families.md from it; 1 if a cell is red
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import family_double as double
from benchmarks.families_text import BOUNDS, CODE, DOUBLE, DOUBLES, METHODS, ONE, RANKS, merge
from benchmarks.family_cells import FamilySpec, write_rows
from benchmarks.family_models import kind, names
from benchmarks.family_verdicts import row_of
from benchmarks.groups import Crew, Journal, run
from benchmarks.matrix_text import origin
from benchmarks.verdicts import differences

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "families"
"""Where a run keeps its journal, its models and its rows."""

PROGRAM = "benchmarks.family_cells"
HUNG_S = {DOUBLE: 1200.0, ONE: 600.0, **dict.fromkeys(RANKS, 120.0), **dict.fromkeys(DOUBLES.values(), 600.0)}
"""Column -> seconds after which a cell hangs."""


def specs(
    chosen: Sequence[str], column: str, methods: Sequence[str] = METHODS, folder: Path = FOLDER
) -> dict[str, FamilySpec]:
    """Name of a cell, COLUMN|NAME METHOD -> what is run. column: single, a strategy with a number of ranks, or the same
    in float64."""
    strategy = ONE if column == DOUBLE else column.split()[0]
    place = folder / DOUBLE if column in (DOUBLE, *DOUBLES.values()) else folder
    return {
        f"{column}|{name} {method}": FamilySpec(name, method, strategy, str(place))
        for method in methods
        for name in chosen
        if method == "lora" or not kind(name).adapts
    }


def measure(chosen: Sequence[str], methods: Sequence[str], journal: Journal, jobs: int, *, ranks: bool) -> None:
    """Run what the journal lacks of these rows: in single processes, jobs at a time, then on two ranks.

    What is not equal in fp32, to plain transformers or on two ranks to one, is measured again in float64.
    """
    single = run(Crew(jobs, alone=True, program=PROGRAM, hung=HUNG_S[ONE]), specs(chosen, ONE, methods), journal)
    apart = [
        _row(name) for name, cell in single.items()
        if isinstance(off := cell.get("plain"), float) and off > BOUNDS["plain"]
    ]  # fmt: skip
    _again(DOUBLE, jobs, apart, specs(chosen, DOUBLE, methods), journal)
    for column in RANKS if ranks else ():
        todo = specs(chosen, column, methods)
        runs = {name: spec for name, spec in todo.items() if "losses" in single[f"{ONE}|{_row(name)}"]}
        found = run(Crew(2, program=PROGRAM, hung=HUNG_S[column]), runs, journal)
        apart = [
            _row(name) for name, cell in found.items()
            if "losses" in cell and not max(differences(cell, single[f"{ONE}|{_row(name)}"])) <= BOUNDS[column]
        ]  # fmt: skip
        for wide in (DOUBLE, DOUBLES[column]):
            _again(wide, jobs, apart, specs(chosen, wide, methods), journal)


def _again(column: str, jobs: int, rows: Sequence[str], every: Mapping[str, FamilySpec], journal: Journal) -> None:
    """Measure these rows, each NAME METHOD, in float64."""
    alone = column == DOUBLE
    crew = Crew(jobs if alone else 2, alone=alone, program=double.PROGRAM, hung=HUNG_S[column])
    run(crew, {name: spec for name, spec in every.items() if _row(name) in rows}, journal)


def _row(cell: str) -> str:
    """NAME METHOD of COLUMN|NAME METHOD."""
    return cell.partition("|")[2]


def told(chosen: Sequence[str], cells: Mapping[str, Any], code: str) -> dict[str, Any]:
    """What families.json keeps of each row that ran under a method at least."""
    found = {}
    for name in chosen:
        methods = {method: mine for method in METHODS if ONE in (mine := _columns(name, method, cells))}
        if methods:
            found[name] = {**row_of(kind(name), methods), "code": code}
    return found


def _columns(name: str, method: str, cells: Mapping[str, Any]) -> dict[str, Any]:
    found = ((column, cells.get(f"{column}|{name} {method}")) for column in (ONE, DOUBLE, *RANKS, *DOUBLES.values()))
    return {column: _named(cell, name) for column, cell in found if cell is not None}


def _named(cell: dict[str, Any], name: str) -> dict[str, Any]:
    """The cell, whose refusal names its row in the place of this machine's folder."""
    folder = str(FamilySpec(name, "", ONE, str(FOLDER)).folder)
    return {key: value.replace(folder, name) if key == "refused" else value for key, value in cell.items()}


def main() -> int:
    """Measure the rows that are asked for, put them among the others, write data and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="these rows alone, as llama,gemma2: all others stay as they are")
    parser.add_argument("--anew", action="store_true", help="measure again what was measured on this very code")
    parser.add_argument("--jobs", type=int, default=2, help="single processes at a time")
    parser.add_argument("--no-ranks", action="store_true", help="leave out the columns of two ranks")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="of the rows that are measured")
    args = parser.parse_args()
    every = names()
    chosen = args.only.split(",") if args.only else every
    if unknown := sorted(set(chosen) - set(every)):
        parser.error(f"--only must be model types of transformers or rows of VARIANTS, got {', '.join(unknown)}")
    here = origin(CODE)
    journal = Journal(FOLDER / "cells.jsonl", here["code"])
    for place in (FOLDER, FOLDER / DOUBLE):
        place.mkdir(parents=True, exist_ok=True)
        write_rows(place / "rows.jsonl")
    journal.forget([f"{name} {method}" for name in chosen for method in METHODS], keep=not args.anew)
    try:
        measure(chosen, args.methods, journal, args.jobs, ranks=not args.no_ranks)
    finally:  # asked to stop, too
        code = merge(told(chosen, journal.read(), here["code"]), here, order=every)
    return code


if __name__ == "__main__":
    sys.exit(main())
