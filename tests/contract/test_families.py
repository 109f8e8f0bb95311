"""dsft/families.json and the code agree on families of each verdict; its page is its data."""

import re
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families_text import DATA, DOUBLE, ONE, PAGE, page, red, right
from benchmarks.family_cells import FamilySpec, single, write_rows
from benchmarks.family_elsewhere import score, train
from benchmarks.family_models import kind, names
from benchmarks.family_verdicts import row_of
from benchmarks.matrix_text import read
from dsft.comm.world import World

TABLE = read(DATA)
ALONE = World(0, 1, 0, torch.device("cpu"))
SAMPLE = [
    ("llama tied", "full"), ("mistral", "lora"), ("gemma3_text", "lora"), ("qwen3_moe", "lora"), ("lfm2", "lora"),
    ("granitemoehybrid", "lora"), ("mamba2", "full"), ("bloom", "lora"), ("falcon", "lora"), ("gpt2", "lora"),
    ("bart", "lora"), ("diffllama", "lora"), ("mixtral with experts", "lora"),
]  # fmt: skip
"""Rows of each verdict, each under the method that costs less or shows more."""


ONCE, TWICE = {"losses": [1.0], "norms": [1.0]}, {"losses": [1.0], "norms": [1.5]}
LOST = {"losses": [float("nan")], "norms": [1.0]}
OPEN: tuple[str, ...] = ()
"""Red cells that are known."""


class Here:
    """Plain transformers and PEFT in this process, for requests as family_plain.Plain takes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in the process of its own
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


def test_no_cell_is_red_that_is_not_known() -> None:
    assert red(TABLE).keys() == set(OPEN)


@pytest.mark.parametrize(
    ("double", "told"),
    [
        ({"plain": 1e-13}, {"off": 3e-4, "double": 1e-13}),
        ({"plain": 2e-4}, {"red": "differs by 3.0e-04, and by 2.0e-04 in float64"}),
        ({"crashed": "no memory"}, {"red": "differs by 3.0e-04, and gives nothing in float64"}),
        (None, {"red": "differs by 3.0e-04"}),
    ],
)
def test_what_differs_in_fp32_is_right_where_float64_says_rounding(
    double: dict[str, Any] | None, told: dict[str, Any]
) -> None:
    family = {"packs": True, "attention": "sdpa", "reason": ""}
    single = {"family": family, "plain": 3e-4, "packed": 0.0, "again": 0.0, "export": 0.0}
    cells = {ONE: single, **({} if double is None else {DOUBLE: double})}
    assert row_of(kind("llama"), {"lora": cells})["methods"]["lora"]["plain"] == told


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"fsdp x2": TWICE}, {"red": "differs by 5.0e-01"}),
        ({"fsdp x2": TWICE, DOUBLE: ONCE, "fsdp x2 float64": ONCE}, {"off": 0.5, "double": 0.0}),
        (
            {"fsdp x2": TWICE, DOUBLE: ONCE, "fsdp x2 float64": TWICE},
            {"red": "differs by 5.0e-01, and .*"},
        ),
        ({"fsdp x2": ONCE, DOUBLE: ONCE, "fsdp x2 float64": TWICE}, {"off": 0.0}),
        ({"fsdp x2": LOST, DOUBLE: ONCE, "fsdp x2 float64": ONCE}, {"red": "differs by inf"}),
        ({"fsdp x2": {"refused": "strategy must not"}}, {"none": "refused", "why": "strategy must not"}),
        ({"fsdp x2": {"crashed": "no memory"}}, {"red": "no memory"}),
        ({}, {"none": "not run"}),
    ],
)
def test_what_two_ranks_gave_is_held_to_one_process(cells: dict[str, Any], told: dict[str, Any]) -> None:
    family = {"packs": True, "attention": "sdpa", "reason": ""}
    single = {"family": family, "plain": 0.0, "packed": 0.0, "again": 0.0, "export": 0.0, **ONCE}
    found = row_of(kind("llama"), {"lora": {ONE: single, **cells}})["methods"]["lora"]["fsdp x2"]
    assert found.keys() == told.keys()
    for key, value in told.items():
        assert found[key] == value if not isinstance(value, str) else re.fullmatch(value, found[key])


def test_every_type_whose_names_peft_rewrites_is_measured() -> None:
    """PEFT's table is read, so that a type that it gains asks for a row here."""
    from peft.utils import transformers_weight_conversion as rewriting

    kinds, rewritten = rewriting._MODEL_TO_CONVERSION_PATTERN, rewriting._MOE_TARGET_MODULE_MAPPING
    causal = {name for name in {*kinds, *rewritten} if kinds.get(name, name) in rewritten} & set(names())
    assert len(causal) >= 24
    assert [name for name in causal if "lora" not in TABLE["rows"][name]["methods"]] == []


def test_eighty_families_are_right_under_lora() -> None:
    assert len(right(TABLE, "lora")) >= 80


def test_the_page_is_the_data() -> None:
    assert PAGE.read_text() == page(TABLE)
