"""Runs the damages of run folders in warm groups of processes, one group per layout."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.damages import damages
from benchmarks.fault_layouts import LAYOUTS, TRAINED
from benchmarks.groups import Crew, Journal, run
from benchmarks.matrix_rows import write_rows

PROGRAM = "benchmarks.fault_cells"


@dataclass(frozen=True)
class Cell:
    """A damage under a layout. place: the run folder that is copied and damaged."""

    layout: str
    damage: str
    place: str


def names(layout: str, like: str = "") -> list[str]:
    """The damages of a layout, in order. like: a pattern of those that are wanted."""
    found = LAYOUTS[layout]
    return [damage.name for damage in damages(found.size, found.files) if re.search(like, damage.name)]


def run_damages(
    layouts: Sequence[str], folder: Path, journal: Journal, *, like: str = "", each: int = 1
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Layout -> damage -> what was found ("wrong": empty if all is right), or {"crashed": error}.

    folder: where the run folders are made, and copied from as long as the journal knows them. like: a pattern of
    damages; each: every so many of them, from another one on under each layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl", 10)
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for index, name in enumerate(layouts):
        layout = LAYOUTS[name]
        place = str(folder / re.sub(r"\W+", "-", name))
        writers = layout.wrote[1] if layout.wrote else layout.size
        trained = run(Crew(writers, program=PROGRAM), {f"{TRAINED}|{name}": Cell(name, TRAINED, place)}, journal)
        if "crashed" in (first := next(iter(trained.values()))):
            raise RuntimeError(f"{name}: the run that is to be damaged could not be made: {first['crashed']}")
        todo = {f"{damage}|{name}": Cell(name, damage, place) for damage in names(name, like)[index % each :: each]}
        cells = run(Crew(layout.size, program=PROGRAM), todo, journal)
        found[name] = {key.rpartition("|")[0]: cell for key, cell in cells.items()}
    return found
