"""The matrix of faults: damages of run folders under every layout, and real starts in which faults happen.

python -m benchmarks.faults            writes dsft/faults.json, and docs/faults.md from it; 1 if a cell is red
python -m benchmarks.faults --long     the campaign of faults at random moments: writes benchmarks/results/faults.md
"""

import argparse
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.campaign import CASES, campaign
from benchmarks.campaign_text import report
from benchmarks.damage_matrix import run_damages
from benchmarks.damages import damages
from benchmarks.fault_layouts import LAYOUTS
from benchmarks.fault_pairs import PAIRS, play_pair
from benchmarks.fault_rows import rows
from benchmarks.fault_starts import Row, play
from benchmarks.faults_text import merge, origin
from benchmarks.groups import Journal
from benchmarks.kills import survive
from benchmarks.run_folders import differences, events, lines, saved_state, words

__all__ = ["CASES", "differences", "events", "lines", "saved_state", "survive", "words"]
"""What tests and other benchmarks take from here."""

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "faults"
"""Where a run of this keeps its journals and its run folders."""

STARTS = "starts"


def wanted_rows(like: str) -> list[tuple[Row, int]]:
    """Rows of real starts and numbers of ranks, those whose name fits."""
    return [(row, ranks) for row in (*rows(), *PAIRS) for ranks in row.ranks if re.search(like, f"{row.name} x{ranks}")]


def run_starts(pairs: Sequence[tuple[Row, int]], folder: Path, journal: Journal) -> dict[str, Any]:
    """Play the rows that the journal does not have yet; name of the row and its ranks -> what was found."""
    done, found = journal.read(), {}
    for index, (row, ranks) in enumerate(pairs, start=1):
        name = f"{row.name} x{ranks}|{STARTS}"
        if name not in done:
            player = play_pair if row in PAIRS else play
            done[name] = player(row, ranks, folder)
            journal.write(name, done[name])
            said = "; ".join(done[name]["wrong"]) or "right"
            print(f"{index} of {len(pairs)} starts, {row.name} x{ranks}: {said}", flush=True)
        found[f"{row.name} x{ranks}"] = {**done[name], "promise": row.promise}
    return found


def shown_damages(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Damage -> layout -> right, or what is wrong; as faults.json keeps it, with the names that all layouts share."""
    found: dict[str, dict[str, str]] = {}
    for name, layout in LAYOUTS.items():
        kinds = damages(layout.size, layout.files)
        for damage, alike in zip(kinds, damages(2, 2), strict=True):
            if (cell := cells.get(name, {}).get(damage.name)) is not None:
                found.setdefault(alike.name, {})[name] = verdict(cell)
    return found


def verdict(cell: Mapping[str, Any]) -> str:
    """right, or in a line what is wrong."""
    return "; ".join(cell["wrong"]) or "right" if "wrong" in cell else f"crashed: {cell['crashed']}"


def matrix(args: argparse.Namespace) -> int:
    """Run what is asked for of damages and starts, and write what was found."""
    here = origin()
    layouts = [name for name in LAYOUTS if re.search(args.layouts, name)]
    pairs = wanted_rows(args.starts)
    FOLDER.mkdir(parents=True, exist_ok=True)
    journal = Journal(FOLDER / "cells.jsonl", here["code"])
    journal.forget([*layouts, STARTS], keep=args.resume)
    cells: dict[str, Any] = {}
    began = time.monotonic()
    try:
        if not args.no_damages:
            for name in layouts:
                cells |= run_damages([name], FOLDER / "damages", journal)
        starts = {} if args.no_starts else run_starts(pairs, FOLDER / STARTS, journal)
    except SystemExit:  # asked to stop: what is there is in the journal
        print("stopped; --resume goes on", file=sys.stderr)
        raise
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")
    names = [f"{row.name} x{ranks}" for row, ranks in wanted_rows("")]
    return merge(shown_damages(cells), starts, here, names)


def long(args: argparse.Namespace) -> int:
    """The campaign; 1 if a run is not bit-equal to its reference."""
    here = origin()
    names = [name for name in CASES if re.search(args.layouts, name)]
    began = time.monotonic()
    found = campaign(args.kills, args.seed, FOLDER / "long", here["code"], names)
    typed = shlex.join(["python", "-m", "benchmarks.faults", *sys.argv[1:]])
    args.out.write_text(report(found, typed, (time.monotonic() - began) / 60))
    return int(any(different for _, different in found.values()))


def main() -> int:
    """The matrix, or the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", help="keep what was found on this very code")
    parser.add_argument("--layouts", default="", help="a pattern of layouts, or of the campaign's configurations")
    parser.add_argument("--starts", default="", help="a pattern of rows of real starts, as '^hang.*x2'")
    parser.add_argument("--no-damages", action="store_true", help="real starts alone")
    parser.add_argument("--no-starts", action="store_true", help="damages alone")
    parser.add_argument("--long", action="store_true", help="the campaign; it goes on where it was on this very code")
    parser.add_argument("--kills", type=int, default=200, help="faults of the campaign, over all configurations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.md")
    args = parser.parse_args()
    return long(args) if args.long else matrix(args)


if __name__ == "__main__":
    sys.exit(main())
