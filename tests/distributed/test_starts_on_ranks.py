"""A run that starts from an adapter equals one process on any ranks: what was stored is cut like all else."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.matrix import COLUMNS, SINGLE, cells, run_cells, verdict
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
RANKS = [column for column in COLUMNS if column.name in ("ddp x2", "fsdp x2", "zero3 x2")]


@pytest.mark.timeout(1800)
def test_a_run_from_an_adapter_equals_one_process_under_every_strategy(rows: Path, tmp_path: Path) -> None:
    for method, words in STARTS.items():
        left_by(tmp_path / method, method, *words)

    def todo(column: Any) -> dict[str, Any]:
        made = cells(column, rows, ("tiny",), tuple(STARTS), ("none",))
        method_of = {name: name.split()[1] for name in made}
        return {
            f"{column.name}|{name}": [
                [*words, *STARTS[method_of[name]], f"method.init_from={tmp_path / method_of[name]}"],
                None,
            ]
            for name, words in made.items()
        }

    alone = run_cells(todo(SINGLE), 1)
    on_ranks = run_cells({name: cell for column in RANKS for name, cell in todo(column).items()}, 2)
    assert len(on_ranks) == len(RANKS) * len(STARTS)
    for column in RANKS:
        for method in STARTS:
            cell = f"tiny {method} none"
            single = alone[f"{SINGLE.name}|{cell}"]
            said = verdict(cell, on_ranks[f"{column.name}|{cell}"], single, column)
            assert "off" in said, (column.name, cell, said)
