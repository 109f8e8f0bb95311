"""A corner of the equality matrix, and two planted faults that must turn it red; the whole is `make matrix`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.collectives import closed_form
from benchmarks.matrix import COLUMNS, METHODS, MODELS, SINGLE, SINGLE_SGD, VARIANTS, difference, run_columns, verdict
from benchmarks.matrix_text import BOUND
from dsft.compose import compose
from dsft.engine.assemble import skeleton

CORNER: dict[str, Any] = {"only": ("tiny full full", "tiny qlora none")}
PLANTED = ("local-counts", "lost-gradients")
SIZES = sorted({column.size for column in COLUMNS})


@pytest.fixture(scope="module")
def single(rows: Path) -> dict[str, Any]:
    return _alone(rows, CORNER)


@pytest.fixture(scope="module", params=SIZES)
def ran(request: pytest.FixtureRequest, rows: Path) -> dict[str, Any]:
    """Column -> cell -> measured, on so many processes."""
    return run_columns(_columns(request.param), rows, **CORNER)


def _columns(size: int) -> list[Any]:
    return [column for column in COLUMNS if column.size == size]


def _alone(rows: Path, what: dict[str, Any]) -> dict[str, Any]:
    """Optimizer -> cell -> measured, on one process."""
    alone = run_columns((SINGLE, SINGLE_SGD), rows, **what)
    return {SINGLE.optim: alone[SINGLE.name], SINGLE_SGD.optim: alone[SINGLE_SGD.name]}


def test_every_strategy_equals_one_process(ran: dict[str, Any], single: dict[str, Any]) -> None:
    _all_green(ran, single)


def test_every_method_equals_one_process_under_some_strategy(rows: Path) -> None:
    """A cover: each method once on its own base, two of three also on a packed one, each on the next strategy."""
    plain, packed = ([name for name in METHODS if ("+" in name) is packing] for packing in (False, True))
    wanted = [f"tiny {name} {list(VARIANTS)[index % 2]}" for index, name in enumerate(plain)]
    wanted += [f"tiny {name} {'none' if name.endswith('nf4') else 'full'}" for name in packed[::3]]
    columns = [column for column in _columns(2) if column.optim == "adamw"]
    alone = run_columns((SINGLE,), rows, only=tuple(wanted))[SINGLE.name]
    for index, column in enumerate(columns):
        mine = tuple(wanted[index :: len(columns)])
        _all_green(run_columns((column,), rows, only=mine), {SINGLE.optim: {cell: alone[cell] for cell in mine}})


@pytest.mark.slow
def test_a_fake_group_counts_the_collectives_of_a_real_one(ran: dict[str, Any], rows: Path) -> None:
    cell, strategies = "tiny full full", ("ddp", "fsdp", "hsdp", "zero3")
    columns = [c for c in COLUMNS if c.name in ran and c.strategy in strategies]
    fake = run_columns(columns, rows, only=(cell,), fake=True)
    run = compose(["model=tiny", "method=full", "train.precision=fp32"]).run
    bones = skeleton(run, run.model.resolve())
    for column in columns:
        counted = ran[column.name][cell]["collectives"]
        assert fake[column.name][cell]["collectives"] == counted, column.name
        shards = column.size // (column.copies or 1)
        kept = "strategy.keep_unsharded=true" in column.extra
        ranks = {"size": column.size, "shards": shards, "micro_batches": 4 // column.size, "kept": kept}
        expected = closed_form(bones, column.strategy, "fp32", **ranks)
        assert {name: nbytes for name, (_, nbytes) in counted.items() if "numbers" not in name} == expected, column.name


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", SIZES)
def test_packed_equals_unpacked_under_every_strategy_and_method(size: int, rows: Path) -> None:
    whole: dict[str, Any] = {"variants": ("none",)}
    _all_green(run_columns(_columns(size), rows, **whole), _alone(rows, whole))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_compiled_blocks_on_ranks_equal_one_plain_process(rows: Path, single: dict[str, Any]) -> None:
    columns = [column for column in _columns(2) if column.name in ("fsdp x2", "zero3 x2")]
    compiled = [replace(column, extra=(*column.extra, "train.compile=true")) for column in columns]
    _all_green(run_columns(compiled, rows, **CORNER), single)


def _all_green(results: dict[str, Any], single: dict[str, Any]) -> None:
    for column in (column for column in COLUMNS if column.name in results):
        cells, alone = results[column.name], single[column.optim]
        assert cells.keys() == alone.keys()
        said = {cell: verdict(cell, cells[cell], alone[cell], column) for cell in alone}
        assert not [cell for cell in said if "red" in said[cell]], (column.name, said)
        assert [cell for cell in said if "refused" in said[cell]] == [
            cell for cell in alone if "refused" in alone[cell]
        ]


@pytest.mark.parametrize("size", [2])
def test_planted_faults_turn_every_strategy_red(size: int, rows: Path, single: dict[str, Any]) -> None:
    _all_red(size, rows, single, {"only": CORNER["only"][:1]})


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", SIZES)
def test_planted_faults_turn_every_distributed_cell_red(size: int, rows: Path) -> None:
    whole: dict[str, Any] = {"models": MODELS, "methods": tuple(METHODS)}
    _all_red(size, rows, _alone(rows, whole), whole)


def _all_red(size: int, rows: Path, single: dict[str, Any], corner: dict[str, Any]) -> None:
    columns = _columns(size)
    results = run_columns(columns, rows, **corner, planted=PLANTED)
    for column in columns:
        assert results[column.name]
        for cell, measured in results[column.name].items():
            off = difference(measured, single[column.optim][cell.split("!")[0]])
            assert off > 100 * BOUND, (column.name, cell, off)
