"""dsft/matrix.json and the code agree: what it calls refused is, in the same words, and what it calls equal is not."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.matrix import COLUMNS, rows, words
from benchmarks.matrix_text import DATA, PAGE, page, read
from benchmarks.refusals import refusal
from dsft.compose import compose

MATRIX = read(DATA)
CELLS = [(name, column) for name in MATRIX["rows"] if name in rows() for column in COLUMNS]
SAMPLED = [(name, COLUMNS[index % len(COLUMNS)]) for index, name in enumerate(MATRIX["rows"]) if name in rows()]
"""Each row under one strategy, each strategy under every eighth row."""


def _words(name: str, column: Any) -> list[str]:
    """The cell's own, on as many processes as it had."""
    return [*words(column, name, Path("rows.jsonl")), "launcher=local", f"launcher.devices={column.size}"]


def _disagreements(cells: list[tuple[str, Any]]) -> list[str]:
    found = []
    for name, column in cells:
        cell = MATRIX["rows"][name]["cells"][column.name]
        if "refused" in cell:
            said = refusal(_words(name, column))
            if said != cell:
                found.append(f"{name}, {column.name}: refused in the matrix by {cell}, now {said}")
            continue
        try:
            compose(_words(name, column))
        except ValueError as error:
            found.append(f"{name}, {column.name}: run in the matrix, now refused: {error}")
    return found


def test_rules_and_matrix_agree() -> None:
    """Of what is refused each (row, reason) once, of what is equal a sample; all of it is slow."""
    refused = {
        (name, cell["refused"]): (name, column)
        for name, column in CELLS if "refused" in (cell := MATRIX["rows"][name]["cells"][column.name])
    }  # fmt: skip
    assert _disagreements([*refused.values(), *SAMPLED]) == []


@pytest.mark.slow
def test_rules_and_matrix_agree_in_every_cell() -> None:
    assert _disagreements(CELLS) == []


def test_no_cell_is_red() -> None:
    cells = {f"{name}, {column}": cell for name, row in MATRIX["rows"].items() for column, cell in row["cells"].items()}
    assert {name: cell["red"] for name, cell in cells.items() if "red" in cell} == {}


def test_the_page_is_the_data() -> None:
    assert PAGE.read_text() == page(MATRIX)
