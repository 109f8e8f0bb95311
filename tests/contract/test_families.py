"""dsft/families.json and the code agree on families of each verdict; its page is its data."""

from importlib.metadata import version
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
    ("llama tied", "full"), ("mistral", "lora"), ("gemma3_text", "lora"), ("qwen3_moe", "lora"), ("lfm2", "lora"),
    ("granitemoehybrid", "lora"), ("mamba2", "full"), ("bloom", "lora"), ("falcon", "lora"), ("gpt2", "lora"),
    ("bart", "lora"), ("diffllama", "lora"),
]  # fmt: skip
"""Rows of each verdict, each under the method that costs less or shows more."""


OPEN = (
    "apertus, full, export",
    "axk1, full, export",
    "beam, full, export",
    "deepseek_v32, full, export",
    "deepseek_v4, full, export",
    "dots1, full, export",
    "dots3_note, full, export",
    "inkling2_text, lora, plain",
    "inkling2_text, lora, export",
    "laguna, lora, plain",
    "laguna, lora, export",
    "longcat_flash, lora, plain",
    "longcat_flash, lora, packed",
    "prophetnet, lora, plain",
    "qwen3_5, lora, plain",
    "qwen3_5_moe, lora, plain",
    "qwen3_5_moe_text, lora, plain",
    "qwen3_5_text, lora, plain",
    "qwen3_next, lora, plain",
    "zamba2, lora, plain",
)
"""Red cells that are known: whole results without buffers of the base, and what was not looked into yet."""


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
    versions = {at["transformers"] for at in TABLE["origins"].values()}
    if versions == {version("transformers")}:
        assert set(names()) - set(TABLE["rows"]) == set()
    assert len({row["model_type"] for row in TABLE["rows"].values()}) > 180


def test_no_cell_is_red_but_the_open_ones() -> None:
    assert sorted(red(TABLE)) == sorted(OPEN)


def test_eighty_families_are_right_under_lora() -> None:
    assert len(right(TABLE, "lora")) >= 80


def test_the_page_is_the_data() -> None:
    assert PAGE.read_text() == page(TABLE)
