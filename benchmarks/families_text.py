"""The table of families as data, dsft/families.json, and as a page that is written from it, docs/families.md."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from string import ascii_lowercase
from typing import Any

from benchmarks.matrix_text import ROOT, among, as_json

ONE, DOUBLE, RANKS = "single", "float64", ("fsdp x2", "zero3 x2")
DOUBLES = {column: f"{column} {DOUBLE}" for column in RANKS}
"""Column of two ranks -> the same in float64."""
METHODS = ("lora", "full")
WITH_EXPERTS = " with experts"
"""End of the name of a row in which LoRA is on fused experts too, and no other method is run."""
BOUNDS = {"plain": 1e-5, "packed": 1e-5, "again": 1e-6, "export": 1e-4, **dict.fromkeys(RANKS, 1e-5)}
"""Column -> the largest relative difference that is right."""
ROUNDING = 1e-9
"""Of what is measured again in float64: it is right where its difference in fp32 is beyond its bound by rounding."""

DATA, PAGE = ROOT / "dsft" / "families.json", ROOT / "docs" / "families.md"
CODE = (
    "dsft", "conf", "launchers", "benchmarks/family_cells.py", "benchmarks/family_models.py",
    "benchmarks/family_elsewhere.py", "benchmarks/family_double.py",
)  # fmt: skip
"""What a cell's figures depend on."""

HEAD = """\
# Model families

Every causal language model class of transformers, as a small random model of its default configuration with each kind
of block that it has, trained for 3 optimizer steps in fp32. Windows, chunks and original rope lengths are 8 to 16
tokens, rows up to 75. The numbers are largest relative differences of loss and gradient norm over these steps:

- plain: to transformers, and PEFT for LoRA, in a process without dsft that computes each example alone;
- packed: as dsft computes them to one by one (`train.micro_batch_tokens=1`), as a model that is alone always is;
- fsdp x2, zero3 x2: two ranks to one process; in these columns and in plain, where rounding grows beyond the bound, as
  in some recurrences, the same in float64 stands beside it;
- again: `train.gradient_checkpointing=full` to none;
- export: of the logits of the longest row, relative to the largest, that the exported adapter or whole model gives in a
  process without dsft, to those of the model that was trained.

LoRA has rank 4 on all linears, in the rows *with experts* rank 3 on fused experts too, and AdamW with eps 1e-4, the
whole model SGD, both at lr 1e-2. A model *packs* if its
examples may share a row; *alone*: each example is a micro-batch of its own; *own attention*: so it is, with the
attention of its class. A refusal is the line that `dsft run` ends with, exit code 2, before weights are read and a run
folder is made. Which of these a model is, dsft finds out on a small copy of it before each new run
([trial.py](../dsft/engine/trial.py)); this table is what that finds for the defaults of transformers, and holds it to
the numbers above.
"""


def merge(found: Mapping[str, Any], here: Mapping[str, str], order: Sequence[str]) -> int:
    """Put the rows found here among those of earlier runs, write data and page; 1 if any cell is red.

    order: the names of all rows that there can be; others are dropped.
    """
    libraries = {name: version(name) for name in ("peft", "transformers")}
    data = {"bounds": BOUNDS, **among(found, DATA, {**here, **libraries}, order)}
    if not found:
        return 1
    DATA.write_text(as_json(data))
    PAGE.write_text(page(data))
    print(f"{DATA}: {len(found)} rows measured, {len(data['rows'])} in all; {PAGE}")
    for name, why in red(data).items():
        print(f"red: {name}: {why}")
    return int(bool(red(data)))


def red(data: Mapping[str, Any]) -> dict[str, str]:
    """NAME, METHOD, COLUMN -> what is wrong there."""
    found = {}
    for name, row in data["rows"].items():
        for method, cells in row["methods"].items():
            if isinstance(cells.get("red"), str):
                found[f"{name}, {method}"] = cells["red"]
                continue
            for column in BOUNDS:
                if "red" in cells.get(column, {}):
                    found[f"{name}, {method}, {column}"] = cells[column]["red"]
    return found


def right(data: Mapping[str, Any], method: str) -> list[str]:
    """Model types of which a row is run under method, and no column of it is red."""
    wrong = {name.split(", ")[0] for name in red(data) if name.split(", ")[1] == method}
    return sorted(
        {row["model_type"] for name, row in data["rows"].items() if "plain" in row["methods"].get(method, {})}
        - {data["rows"][name]["model_type"] for name in wrong}
    )


def page(data: Mapping[str, Any]) -> str:
    """docs/families.md."""
    letters = dict(zip(data["origins"], ascii_lowercase, strict=False))
    head = "| model | computed | method | " + " | ".join(BOUNDS) + " | code |"
    table = [head, "|---|---|---|" + "---|" * (len(BOUNDS) + 1)]
    for name, row in data["rows"].items():
        for method, cells in row["methods"].items():
            if "refused" not in cells and "unmade" not in cells:
                table.append(f"| {_line(name, row, method, cells)} | {letters[row['code']]} |")
    return "\n".join([HEAD, *_counts(data), "", *_origins(data, letters), "", *table, *_reasons(data)]) + "\n"


def _line(name: str, row: Mapping[str, Any], method: str, cells: Mapping[str, Any]) -> str:
    if isinstance(cells.get("red"), str):
        return " | ".join([name, row["verdict"], method, f"**RED** {_cell(cells['red'])}", *[""] * (len(BOUNDS) - 1)])
    return " | ".join([name, row["verdict"], method, *(_shown(cells[column]) for column in BOUNDS)])


def _shown(cell: Mapping[str, Any]) -> str:
    if "red" in cell:
        return f"**RED** {_cell(cell['red'])}"
    if "none" in cell:
        return str(cell["none"])
    return f"{cell['off']:.0e}" + (f" ({cell['double']:.0e} in float64)" if "double" in cell else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _counts(data: Mapping[str, Any]) -> Iterator[str]:
    rows = data["rows"].values()
    types = {row["model_type"] for row in rows}
    words = {word: sum(row["verdict"] == word for row in rows) for word in ("packs", "alone", "own attention")}
    refused = sum(row["verdict"] == "refused" for row in rows)
    cells = [cell for row in rows for cells in row["methods"].values() for cell in cells.values()]
    absent = sum(isinstance(cell, dict) and cell.get("none") == "not run" for cell in cells)
    experts = [name for name in data["rows"] if name.endswith(WITH_EXPERTS)]
    absent += len(BOUNDS) * (len(METHODS) * len(rows) - len(experts) - sum(len(row["methods"]) for row in rows))
    wrong = {name.split(", ")[0] for name in red(data)}
    yield (
        f"{len(types)} model types, {len(data['rows'])} rows: "
        + ", ".join(f"{count} {word}" for word, count in words.items())
        + f", {refused} refused. Right under LoRA: {len(right(data, 'lora'))} model types; as a whole: "
        f"{len(right(data, 'full'))}; under LoRA of their experts too: "
        f"{len({*experts} - wrong)}. Red cells: {len(red(data))}; cells not run: {absent}. Made by `make families`, "
        f"{sum(row['seconds'] for row in rows) / 60:.0f} minutes of cells."
    )


def _origins(data: Mapping[str, Any], letters: Mapping[str, str]) -> Iterator[str]:
    for code, at in data["origins"].items():
        count = sum(row["code"] == code for row in data["rows"].values())
        more = ", with changes" if at["commit"].endswith("+") else ""
        yield (
            f"- {letters[code]}: {count} rows measured on commit {at['commit'].removesuffix('+')}{more} (code {code}), "
            f"{at['machine']}, transformers {at['transformers']}, peft {at['peft']}."
        )


def _reasons(data: Mapping[str, Any]) -> Iterator[str]:
    """Why rows do not pack, why they are refused, and which were not made."""
    alone = {name: row["reason"] for name, row in data["rows"].items() if row["verdict"] in ("alone", "own attention")}
    yield from ["", "## Why examples are alone", ""] if alone else []
    yield from (f"- {name}: {reason}" for name, reason in alone.items())
    apart = {
        f"{name}, {method}, {column}": cells[column]["why"]
        for name, row in data["rows"].items() for method, cells in row["methods"].items()
        for column in RANKS if "why" in cells.get(column, {})
    }  # fmt: skip
    yield from ["", "## Which strategies are refused", ""] if apart else []
    yield from (f"- {name}: {why}" for name, why in apart.items())
    for word, title in (("refused", "What is refused, and why"), ("unmade", "What could not be made")):
        found: dict[tuple[str, str], list[str]] = {}
        for name, row in data["rows"].items():
            for method, cells in row["methods"].items():
                if word in cells:
                    found.setdefault((name, cells[word]), []).append(method)
        yield from ["", f"## {title}", ""] if found else []
        yield from (f"- {name}, {' and '.join(methods)}: {reason}" for (name, reason), methods in found.items())
