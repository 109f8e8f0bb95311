"""A corner of the equality matrix, and two planted faults that must turn it red; the whole is `make matrix`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from benchmarks.collectives import closed_form
from benchmarks.groups import Journal, run
from benchmarks.matrix import (
    COLUMNS,
    METHODS,
    MODELS,
    SINGLE,
    SINGLE_SGD,
    SIZES,
    VARIANTS,
    Column,
    by_column,
    crew,
    run_alone,
    run_columns,
    specs,
    with_faults,
)
from benchmarks.matrix_rows import OBJECTIVES
from benchmarks.matrix_text import BOUND
from benchmarks.verdicts import difference, verdict
from dsft.compose import compose
from dsft.engine.assemble import skeleton

STEPS = 5
"""Of a cell, half of the whole matrix's: each loss moves enough in them, if need be at a higher rate."""
CORNER = ("tiny full full", "tiny qlora none")
PLANTED = ("local-counts", "lost-gradients")


def _columns(size: int) -> list[Column]:
    return [column for column in COLUMNS if column.size == size]


def _cover() -> list[tuple[Column, str]]:
    """Each method once on its own base, every fourth one on a packed one too, each time under the next strategy; so
    every strategy meets recomputation and none, and a packed base.
    """
    columns = [column for column in _columns(2) if column.optim == "adamw"]
    plain = [name for name in METHODS if ":" not in name]
    own, packed = ([name for name in plain if ("+" in name) is packing] for packing in (False, True))
    turns = [name for index, name in enumerate(packed) if index % 16 in (0, 7)]  # nf4 and int8 in turn
    names = [f"tiny {name} {list(VARIANTS)[index % 2]}" for index, name in enumerate(own)]
    names += [f"tiny {name} {'none' if name.endswith('nf4') else 'full'}" for name in turns]
    return [(columns[index % len(columns)], name) for index, name in enumerate(names)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all workers that run this module's tests: what one has measured, the next need not."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def _run(pairs: Sequence[tuple[Column, str]], rows: Path, shared: Path, planted: Sequence[str] = ()) -> Any:
    """What cells of one size gave, and what one process did."""
    (size,) = {column.size for column, _ in pairs}
    with FileLock(shared / "equality.lock"):
        journal = Journal(shared / "equality.jsonl", "")
        singles = {"adamw": SINGLE, "sgd": SINGLE_SGD}
        alone = run_alone(list(dict.fromkeys((singles[c.optim], row) for c, row in pairs)), rows, journal, steps=STEPS)
        todo = specs(pairs, rows, alone, steps=STEPS)
        return by_column(run(crew(size), with_faults(todo, planted) if planted else todo, journal)), alone


def _corner(size: int) -> list[tuple[Column, str]]:
    return [(column, row) for row in CORNER for column in _columns(size)]


def _dropping() -> list[tuple[Column, str]]:
    """Dropout under two strategies: packed without recomputation, and alone with it."""
    variants = {"fsdp x2": "none", "zero3 x2": "full"}
    return [(column, f"tiny lora+dropout {variants[column.name]}") for column in COLUMNS if column.name in variants]


def _preferences() -> list[tuple[Column, str]]:
    """Each objective but sft once, under the next strategy, with silent micro-batches among them."""
    columns = [column for column in _columns(2) if column.strategy in ("ddp", "fsdp", "zero2", "zero3")]
    methods = ("lora", "full", "qlora")
    return [
        (columns[index % len(columns)], f"tiny {methods[index % 3]}:{objective} full")
        for index, objective in enumerate(OBJECTIVES)
    ]


def test_every_strategy_and_every_method_equals_one_process_on_two(rows: Path, shared: Path) -> None:
    _all_green(*_run([*_corner(2), *_cover(), *_dropping(), *_preferences()], rows, shared))


def test_every_strategy_equals_one_process_on_four(rows: Path, shared: Path) -> None:
    _all_green(*_run(_corner(4), rows, shared))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_fake_group_counts_the_collectives_of_a_real_one(size: int, rows: Path) -> None:
    cell, strategies = "tiny full full", ("ddp", "fsdp", "hsdp", "zero3")
    columns = [column for column in _columns(size) if column.strategy in strategies]
    ran, fake = (run_columns(columns, rows, only=(cell,), fake=fake, counted=True) for fake in (False, True))
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
    alone = _alone(rows, variants=("none",))
    _all_green(run_columns(_columns(size), rows, variants=("none",), alone=alone), alone)


def _alone(rows: Path, **which: Any) -> dict[str, Any]:
    """Optimizer -> row -> measured, on one process."""
    found = run_columns((SINGLE, SINGLE_SGD), rows, **which)
    return {column.optim: found[column.name] for column in (SINGLE, SINGLE_SGD)}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_compiled_blocks_on_ranks_equal_one_plain_process(rows: Path) -> None:
    columns = [column for column in _columns(2) if column.name in ("fsdp x2", "zero3 x2")]
    compiled = [replace(column, extra=(*column.extra, "train.compile=true")) for column in columns]
    alone = _alone(rows, only=CORNER)
    _all_green(run_columns(compiled, rows, only=CORNER, alone=alone), alone)


def _all_green(results: Mapping[str, Any], alone: Mapping[str, Any]) -> None:
    """No cell is red, and none is refused but where one process is."""
    wrong = []
    for column in (column for column in COLUMNS if column.name in results):
        for row, cell in results[column.name].items():
            single = alone[column.optim][row]
            said = verdict(row, cell, single, column)
            if "red" in said or ("refused" in said and "refused" not in single):
                wrong.append((column.name, row, said))
    assert not wrong


def test_planted_faults_turn_every_strategy_red(rows: Path, shared: Path) -> None:
    pairs = [(column, CORNER[0]) for column in _columns(2)]
    _all_red(*_run(pairs, rows, shared, PLANTED), cells=len(pairs) * len(PLANTED))


def test_planted_faults_turn_an_objective_red(rows: Path, shared: Path) -> None:
    """A silent micro-batch that counts changes the loss; a reference of other values on one rank ends the run."""
    pairs = [pair for pair in _preferences() if pair[1].endswith(("dpo full", "kto full"))]
    cells, alone = _run(pairs, rows, shared, ("silent-counts", "other-reference"))
    for column, row in pairs:
        silent, other = (cells[column.name][f"{row}!{fault}"] for fault in ("silent-counts", "other-reference"))
        assert difference(silent, alone["adamw"][row]) > 100 * BOUND
        assert "reference_gap must be 0 before the first update" in other["crashed"]


def test_a_cell_that_crashes_is_red_and_the_others_are_measured(rows: Path, tmp_path: Path) -> None:
    column, journal = COLUMNS[0], Journal(tmp_path / "cells.jsonl", "")
    (good,) = specs([(column, CORNER[0])], rows).values()
    ends = {"raises": replace(good, fault="raises"), "dies": replace(good, fault="dies")}
    found = run(crew(2), {**ends, "good": good}, journal)
    assert found["raises"] == {"crashed": "RuntimeError: planted"}
    assert found["dies"] == {"crashed": "the group ended with 76"}
    assert len(found["good"]["losses"]) == 10
    assert journal.read() == found
    said = verdict(CORNER[0], found["raises"], found["good"], column)
    assert said == {"red": "RuntimeError: planted"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", SIZES)
def test_planted_faults_turn_every_distributed_cell_red(size: int, rows: Path) -> None:
    alone = _alone(rows, models=MODELS)
    _all_red(run_columns(_columns(size), rows, alone=alone, planted=PLANTED), alone, cells=1)


def _all_red(results: Mapping[str, Any], alone: Mapping[str, Any], *, cells: int) -> None:
    """At least so many cells ran, and all are far off."""
    ran = [
        (column, row, cell)
        for column in COLUMNS if column.name in results
        for row, cell in results[column.name].items() if "refused" not in cell
    ]  # fmt: skip
    assert len(ran) >= cells
    for column, row, cell in ran:
        off = difference(cell, alone[column.optim][row.split("!")[0]])
        assert off > 100 * BOUND, (column.name, row, off)
