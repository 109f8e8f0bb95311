"""A corner of the equality matrix, and two planted faults that must turn it red; the whole is `make matrix`."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import write_rows
from benchmarks.matrix import BOUND, COLUMNS, METHODS, MODELS, SINGLE, SINGLE_SGD, difference, faults, run_columns

CORNER: dict[str, Any] = {"only": ("tiny full full", "tiny qlora none")}
PLANTED = ("local-counts", "lost-gradients")
SIZES = sorted({column.size for column in COLUMNS})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, 10)
    return path


@pytest.fixture(scope="module")
def single(rows: Path) -> dict[str, Any]:
    alone = run_columns((SINGLE, SINGLE_SGD), rows, **CORNER)
    return {SINGLE.optim: alone[SINGLE.name], SINGLE_SGD.optim: alone[SINGLE_SGD.name]}


@pytest.mark.parametrize("size", SIZES)
def test_every_strategy_equals_one_process(size: int, rows: Path, single: dict[str, Any]) -> None:
    columns = [column for column in COLUMNS if column.size == size]
    results = run_columns(columns, rows, **CORNER)
    for column in columns:
        alone = single[column.optim]
        assert results[column.name].keys() == alone.keys()
        wrong = {cell: faults(results[column.name][cell], alone[cell], column) for cell in alone}
        assert not any(wrong.values()), (column.name, wrong)


@pytest.mark.parametrize("size", SIZES)
def test_planted_faults_turn_every_strategy_red(size: int, rows: Path, single: dict[str, Any]) -> None:
    _all_red(size, rows, single, {"only": CORNER["only"][:1]})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", SIZES)
def test_planted_faults_turn_every_distributed_cell_red(size: int, rows: Path) -> None:
    whole: dict[str, Any] = {"models": MODELS, "methods": tuple(METHODS)}
    alone = run_columns((SINGLE, SINGLE_SGD), rows, **whole)
    _all_red(size, rows, {"adamw": alone[SINGLE.name], "sgd": alone[SINGLE_SGD.name]}, whole)


def _all_red(size: int, rows: Path, single: dict[str, Any], corner: dict[str, Any]) -> None:
    columns = [column for column in COLUMNS if column.size == size]
    results = run_columns(columns, rows, **corner, planted=PLANTED)
    for column in columns:
        assert results[column.name]
        for cell, measured in results[column.name].items():
            off = difference(measured, single[column.optim][cell.split("!")[0]])
            assert off > 100 * BOUND, (column.name, cell, off)
