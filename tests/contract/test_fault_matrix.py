"""dsft/faults.json and its page agree, know the rows that there are, and hold no red cell."""

import importlib
from functools import reduce
from pathlib import Path

from benchmarks.campaign import PHASES
from benchmarks.damages import damages
from benchmarks.fault_layouts import LAYOUTS
from benchmarks.faults import shown_damages, wanted_rows
from benchmarks.faults_text import PAGE, merge, page, read, red

HERE = {"code": "c0de", "commit": "abc+", "machine": "2 cores", "date": "2026-01-01"}


def test_the_page_is_the_data() -> None:
    assert PAGE.read_text() == page(read())


def test_no_cell_is_red() -> None:
    assert red(read()) == []


def test_every_damage_has_been_tried_under_every_layout() -> None:
    tried = {name: set(row) for name, row in read()["damages"].items()}
    assert tried == {damage.name: set(LAYOUTS) for damage in damages(2, 2)}


def test_the_rows_of_starts_are_those_that_there_are() -> None:
    assert set(read()["starts"]) == {f"{row.name} x{ranks}" for row, ranks in wanted_rows("")}


def test_each_plant_has_a_place() -> None:
    """A function that was renamed would leave a plant that nothing happens at, which is found after an hour."""
    rows = {plant for row, _ in wanted_rows("") for start in getattr(row, "starts", ()) for plant in start.plants}
    places = {plant.place for plant in rows} | {place for phase in PHASES.values() for place in phase}
    assert len(places) > 10
    for place in places:
        module, _, path = place.partition(":")
        assert callable(reduce(getattr, path.split("."), importlib.import_module(module))), place


def test_what_is_found_later_takes_its_place_among_what_was_found_before(tmp_path: Path) -> None:
    data, at = tmp_path / "faults.json", tmp_path / "faults.md"
    right = {"wrong": [], "loaded": 3, "said": "", "seconds": 0.1}
    first, last = damages(4, 4)[0].name, damages(4, 4)[-2].name
    cells = {"fsdp x4": {first: right, last: {"crashed": "ValueError: a | line"}}}
    start = {"command": "train.steps=8", "plants": [], "code": 0, "seconds": 9.5, "after_s": None}
    played = {"a row x2": {"wrong": [], "starts": [start], "seconds": 9.5, "promise": "It goes on"}}
    assert merge(shown_damages(cells), played, HERE, ["a row x2"], data=data, page_at=at) == 1
    assert "**RED** crashed: ValueError: a / line" in at.read_text()
    again = {"fsdp x4": {last: right}}
    assert merge(shown_damages(again), {}, {**HERE, "code": "new"}, ["a row x2"], data=data, page_at=at) == 0
    assert read(data)["damages"][first] == {"fsdp x4": ["right", "c0de"]}
    assert list(read(data)["origins"]) == ["c0de", "new"]
    assert "| It goes on |  | 1 of 1 |" in at.read_text()
    assert "| a row x2 | 1. `train.steps=8` 0, 9.5 s | right |" in at.read_text()
    merge({}, {}, HERE, [], data=data, page_at=at)
    assert read(data)["starts"] == {}
