"""A run that starts from an adapter equals one process on any ranks: what was stored is cut like all else.

Each method under one strategy, in turn; those whose tensors are stored in an own way under all.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.groups import Journal, run
from benchmarks.matrix import COLUMNS, SINGLE, Column, by_column, crew, specs
from benchmarks.verdicts import verdict
from tests.contract.sessions import left_by

STARTS: dict[str, list[str]] = {
    "houlsby": [],  # norms that the base has too
    "compacter": [],
    "bitfit": [],
    "pissa": [],  # one tensor of the file is two of the model, one of them frozen
    "vera": ["method.rank=16"],  # buffers, whole on every rank
    "ia3": [],
    "peft": [],
    "p_tuning_v2": [],  # one tensor of the file is all layers
}
EVERYWHERE = ("pissa", "vera")
RANKS = [column for column in COLUMNS if column.name in ("ddp x2", "fsdp x2", "zero3 x2")]


@pytest.mark.timeout(1800)
def test_a_run_from_an_adapter_equals_one_process_under_every_strategy(rows: Path, tmp_path: Path) -> None:
    for method, words in STARTS.items():
        left_by(tmp_path / method, method, *words)
    found = {f"tiny {method} none": method for method in STARTS}

    def ran(pairs: list[tuple[Column, str]], alone: Any = None) -> dict[str, dict[str, Any]]:
        todo = specs(pairs, rows, alone, steps=5)
        for name, spec in todo.items():
            method = found[name.partition("|")[2]]
            own = (*STARTS[method], f"method.init_from={tmp_path / method}")
            todo[name] = replace(spec, words=(*spec.words, *own))
        size = pairs[0][0].size
        return by_column(run(crew(size), todo, Journal(tmp_path / f"{size}.jsonl", "")))

    alone = {SINGLE.optim: ran([(SINGLE, row) for row in found])[SINGLE.name]}
    pairs = [
        (column, row)
        for turn, (row, method) in enumerate(found.items())
        for place, column in enumerate(RANKS) if method in EVERYWHERE or turn % len(RANKS) == place
    ]  # fmt: skip
    on_ranks = ran(pairs, alone)
    assert on_ranks.keys() == {column.name for column in RANKS}
    for column, row in pairs:
        said = verdict(row, on_ranks[column.name][row], alone[SINGLE.optim][row], column)
        assert "off" in said, (column.name, row, said)
