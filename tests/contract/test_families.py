"""dsft/families.json and the code agree on families of each verdict; no cell of it is red, and its page is its data."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families_text import DATA, ONE, PAGE, page, read, red, right
from benchmarks.family_cells import FamilySpec, single, write_rows
from benchmarks.family_elsewhere import score, train
from benchmarks.family_models import kind, names
from benchmarks.family_verdicts import row_of
from dsft.comm.world import World

TABLE = read(DATA)
ALONE = World(0, 1, 0, torch.device("cpu"))
SAMPLE = [
    ("llama tied", "full"), ("mistral", "lora"), ("gemma3_text", "lora"), ("deepseek_v2", "full"), ("lfm2", "lora"),
    ("mamba2", "full"), ("granitemoehybrid", "lora"), ("bloom", "lora"), ("falcon", "full"), ("gpt2", "lora"),
    ("bart", "lora"), ("xlnet", "full"),
]  # fmt: skip
"""Rows of each verdict, each under the method that costs less or shows more."""


class Here:
    """Plain transformers and PEFT in this process, for requests as family_plain.Plain takes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return train(request) if request["do"] == "train" else score(request, self.folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.mark.parametrize(("name", "method"), SAMPLE)
def test_a_family_is_what_the_table_says(name: str, method: str, place: Path) -> None:
    cell = single(FamilySpec(name, method, ONE, str(place)), ALONE, Here(place), place / "out")
    row, written = row_of(kind(name), {method: {ONE: cell}}), TABLE["rows"][name]
    assert _state(row, method) == _state(written, method)
    assert red({"rows": {name: row}}) == {}


def _state(row: dict[str, Any], method: str) -> tuple[str, list[str]]:
    """The verdict, unless this method is refused, and what the table has of the method."""
    cells = row["methods"][method]
    return "" if "refused" in cells else row["verdict"], sorted(cells)


def test_the_table_has_every_class_of_transformers() -> None:
    assert set(TABLE["rows"]) <= set(names())
    assert len(TABLE["rows"]) > 180


def test_no_cell_is_red() -> None:
    assert red(TABLE) == {}


def test_eighty_families_are_right_under_lora() -> None:
    assert len(right(TABLE, "lora")) >= 80


def test_the_page_is_the_data() -> None:
    assert PAGE.read_text() == page(TABLE)
