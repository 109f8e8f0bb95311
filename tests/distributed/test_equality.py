"""A corner of the equality matrix, and two planted faults that must turn it red; the whole is `make matrix`."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import write_rows
from benchmarks.matrix import BOUND, COLUMNS, SINGLE, difference, faults, run_column

CORNER = ("full", "qlora")
PLANTED = ("local-counts", "lost-gradients")
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
def test_a_column_equals_one_process_and_planted_faults_turn_it_red(
    name: str, rows: Path, single: dict[str, Any]
) -> None:
    column = BY_NAME[name]
    cells = run_column(column, rows, models=("tiny",), methods=CORNER, planted=PLANTED)
    assert len(cells) == 3 * len(single)
    wrong = {cell: faults(cells[cell], alone, column) for cell, alone in single.items()}
    assert not any(wrong.values()), wrong
    for cell, alone in single.items():
        for fault in PLANTED:
            assert difference(cells[f"{cell}!{fault}"], alone) > 100 * BOUND, (cell, fault)
