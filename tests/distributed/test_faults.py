"""A cover of the matrix of faults: every damage on one process, some under two layouts, and a few real starts.

The whole is `make faults`.
"""

import re
from pathlib import Path

import pytest

from benchmarks.damage_matrix import names, run_damages
from benchmarks.fault_layouts import LAYOUTS
from benchmarks.fault_pairs import PAIRS, play_pair
from benchmarks.fault_rows import rows as all_rows
from benchmarks.fault_starts import play
from benchmarks.faults import verdict
from benchmarks.groups import Journal

ROWS = {row.name: row for row in all_rows()}
EACH = 4
"""Every so many damages under a layout of two ranks: every file, and every kind of outcome."""


def _wrong(layout: str, folder: Path, each: int = 1) -> dict[str, str]:
    """Damage -> what is wrong with it; of how many is looked at as well."""
    found = run_damages([layout], folder, Journal(folder / "cells.jsonl", ""), each=each)[layout]
    assert len(found) == -(-len(names(layout)) // each)
    said = {name: verdict(cell) for name, cell in found.items()}
    return {name: what for name, what in said.items() if what != "right"}


def test_every_damage_is_found_on_one_process(tmp_path: Path) -> None:
    assert len(names("single x1")) == 50
    assert _wrong("single x1", tmp_path) == {}


@pytest.mark.parametrize("layout", ["fsdp x2", "zero2 x2"])
def test_damages_are_found_alike_on_two_ranks(layout: str, tmp_path: Path) -> None:
    assert _wrong(layout, tmp_path, EACH) == {}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single x1"])
def test_every_damage_is_found_under_every_layout(layout: str, tmp_path: Path) -> None:
    assert _wrong(layout, tmp_path) == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all rows of starts: undisturbed runs are shared."""
    return tmp_path_factory.mktemp("starts")


STARTED = [
    ("kills: in a step, in a save, in loading", 2),
    ("result: its weights torn", 1),
    ("cause: ValueError on the last rank", 2),
    ("publish: killed while the old one is removed", 1),
]
SLOW = [
    (row.name, ranks) for row in ROWS.values() for ranks in row.ranks
    if (row.name, ranks) not in STARTED and re.match("kills|crashes|publish|result|damage", row.name)
]  # fmt: skip


@pytest.mark.parametrize(("name", "ranks"), [*STARTED, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)])
def test_a_run_keeps_its_promise_through_a_fault(name: str, ranks: int, folder: Path) -> None:
    assert play(ROWS[name], ranks, folder)["wrong"] == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("row", PAIRS, ids=lambda row: row.name)
def test_a_living_run_is_not_taken_over(row, ranks: int, folder: Path) -> None:
    assert play_pair(row, ranks, folder)["wrong"] == []
