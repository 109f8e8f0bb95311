"""A corner of the equality matrix, and two planted faults that must turn it red; the whole is `make matrix`."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import write_rows
from benchmarks.matrix import BOUND, COLUMNS, SINGLE, difference, faults, run_column

CORNER = ("full", "qlora")
BY_NAME = {column.name: column for column in COLUMNS}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, 10)
    return path


@pytest.fixture(scope="module")
def single(rows: Path) -> dict[str, Any]:
    return run_column(SINGLE, rows, models=("tiny",), methods=CORNER)


@pytest.mark.parametrize("name", ["ddp x2", "fsdp x2", "hsdp 2x2", "zero2 x2", "zero3 x2"])
def test_a_sharded_run_equals_the_single_process(name: str, rows: Path, single: dict[str, Any]) -> None:
    column = BY_NAME[name]
    cells = run_column(column, rows, models=("tiny",), methods=CORNER)
    assert set(cells) == set(single)
    wrong = {cell: faults(found, single[cell], column) for cell, found in cells.items()}
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("fault", ["local-counts", "lost-gradients"])
@pytest.mark.parametrize("name", ["ddp x2", "fsdp x2", "zero3 x2"])
def test_a_planted_fault_turns_every_cell_red(name: str, fault: str, rows: Path, single: dict[str, Any]) -> None:
    cells = run_column(BY_NAME[name], rows, models=("tiny",), methods=CORNER, fault=fault)
    for cell, found in cells.items():
        assert difference(found, single[cell]) > 100 * BOUND, cell
