"""The equality matrix as data, dsft/matrix.json, and as a page that is written from it, docs/matrix.md."""

import hashlib
import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from benchmarks.machine import hardware

BOUND = 1e-5
"""Largest relative difference of loss and gradient norm to `single`, fp32, 10 steps of AdamW at lr 1e-3."""

ROOT = Path(__file__).parents[1]
DATA = ROOT / "dsft" / "matrix.json"
PAGE = ROOT / "docs" / "matrix.md"
CODE = ("dsft", "conf", "launchers", *(f"benchmarks/{name}.py" for name in ("cells", "matrix", "matrix_rows")))
"""What a cell's figures depend on."""

HEAD = """\
# The equality matrix

Largest relative difference of loss and of gradient norm to one process over 10 steps: fp32, AdamW at lr
1e-3 (the sgd column: 0.05) or, where the loss would hardly move, the multiple of it that stands beside the row;
constant rate, dropout 0 (0.1: tests/distributed/test_equality.py and tests/unit/engine/test_dropout.py). none:
nothing is computed again in backward; global batch 8, a rank's two or four examples in one micro-batch. full: every
block is; global batch 4, each example in a micro-batch of its own, as
all are in the one process that a cell is compared to. A base packed by nf4 goes with none, one packed by int8
with full, except where a method brings its own (qlora): that has both. In every cell the label counts of the
ranks differ by 2 x or more and the loss moves by 1 % or more. A sharding cell is green only if the ranks
together hold at most 1.1 x the model (hsdp: 1.1 x its two copies) after step 1. [N] is refused, for the reason
with that number below. (tie N) leaves out step N: there, two experts' scores of a token were within 1e-6 of each
other in the one process, so that rounding chose between them.

Settings beside a row's name are not the method's own: adalora, diff_pruning and ia3 on experts would show little of
themselves in 10 steps, vera's shared projections, whole on every rank, would outweigh so small a model, and in qat
AdamW's usual eps, 1e-8, lets gradients that are but rounding move a weight across a level of its grid: two cells of
tiny qat full, ddp and zero1, then differ by 9e-4 from step 4 on. Run with real models, qat has such jumps, too. LoRA+
on experts moves B by 16 x the rate, and shows such gradients too (1.1e-5 in two cells). parallel_adapter has relu by
its paper: one norm of its cells differed by 1.5e-5, at 5e-9 in the loss, as a number within rounding of 0 had a
gradient in one process and none in the other. tiny_moe_v3 leaves some experts without any token.
"""


def origin(code: Sequence[str] = CODE) -> dict[str, str]:
    """What is measured, and on what: a digest of the code, the commit (+ where files differ from it), the machine."""
    paths = [ROOT / place for place in code]
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    digest = hashlib.sha256()
    for file in files:
        if file.suffix in (".py", ".yaml"):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    changed = "+" if _git("status", "--porcelain", "--", *code, ":!dsft/matrix.json", ":!dsft/families.json") else ""
    commit = (_git("rev-parse", "--short", "HEAD") or "unknown") + changed
    return {"code": digest.hexdigest()[:12], "commit": commit, "machine": hardware()}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def merge(found: Mapping[str, Any], here: Mapping[str, str], order: Sequence[str]) -> int:
    """Put the rows found here among those of earlier runs, write data and page; 1 if any cell is red.

    order: the names of all rows that there can be; others are dropped.
    """
    data = {"bound": BOUND, **among(found, DATA, here, order)}
    if not found:
        return 1
    DATA.write_text(as_json(data))
    PAGE.write_text(page(data))
    print(f"{DATA}: {len(found)} rows measured, {len(data['rows'])} in all; {PAGE}")
    return int(any("red" in cell for cell in _cells(data["rows"])))


def among(found: Mapping[str, Any], path: Path, here: Mapping[str, str], order: Sequence[str]) -> dict[str, Any]:
    """Origins and rows of the data in path, with the rows found here among them; says so where none was found.

    here: code, and what else is kept of where the rows were measured; order: as for merge.
    """
    if not found:
        print("no row is whole: nothing was written")
    before = read(path) if path.is_file() else {"origins": {}, "rows": {}}
    rows = {name: {**before["rows"], **found}.get(name) for name in order}
    rows = {name: row for name, row in rows.items() if row is not None}
    used = {row["code"] for row in rows.values()}
    mine = {key: value for key, value in here.items() if key != "code"}
    origins = {**before["origins"], here["code"]: mine}
    return {"origins": {code: at for code, at in origins.items() if code in used}, "rows": rows}


def read(path: Path) -> dict[str, Any]:
    """The data as they were written."""
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def as_json(data: Mapping[str, Any]) -> str:
    """A row per line."""
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in data["rows"].items())
    head = {key: value for key, value in data.items() if key != "rows"}
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": {{\n{rows}\n }}\n}}\n'


def page(data: Mapping[str, Any]) -> str:
    """docs/matrix.md."""
    rows, origins = data["rows"], data["origins"]
    cells = list(_cells(rows))
    worst = max((cell["off"] for cell in cells if "off" in cell), default=0.0)
    red, refused = (sum(kind in cell for cell in cells) for kind in ("red", "refused"))
    columns = list(next(iter(rows.values()))["cells"]) if rows else []
    reasons, letters = _reasons(cells), dict(zip(origins, ascii_lowercase, strict=False))
    several = len(origins) > 1
    table = [
        "| model, method, recompute | " + " | ".join([*columns, *["code"] * several]) + " |",
        "|---|" + "---|" * (len(columns) + several),
    ]
    for name, row in rows.items():
        shown = [_shown(cell, reasons) for cell in row["cells"].values()]
        table.append(
            "| "
            + " | ".join([", ".join([name, *row["changed"]]) + _rates(row), *shown, *[letters[row["code"]]] * several])
            + " |"
        )
    minutes = sum(row["seconds"] for row in rows.values()) / 60
    made = (
        f"{len(rows)} rows, {len(cells)} cells; bound {data['bound']:g}; largest difference {worst:.1e}; red cells: "
        f"{red}; refused: {refused}. Made by `make matrix`, {minutes:.0f} minutes of cells."
    )
    return "\n".join([HEAD, made, "", *_origins(data, letters), "", *table, *_explained(rows, reasons)]) + "\n"


def _origins(data: Mapping[str, Any], letters: Mapping[str, str]) -> Iterator[str]:
    for code, at in data["origins"].items():
        count = sum(row["code"] == code for row in data["rows"].values())
        letter = f"{letters[code]}: " if len(letters) > 1 else ""
        more = ", with changes" if at["commit"].endswith("+") else ""
        commit = at["commit"].removesuffix("+")
        yield f"- {letter}{count} rows measured on commit {commit}{more} (code {code}), {at['machine']}."


def _rates(row: Mapping[str, Any]) -> str:
    times = {optim: times for optim, times in row["times"].items() if times != 1}
    return "".join(f", {optim} x {times}" for optim, times in times.items())


def _cells(rows: Mapping[str, Any]) -> Iterable[Any]:
    return (cell for row in rows.values() for cell in row["cells"].values())


def _reasons(cells: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each (whose word, reason) once: rules first."""
    found = {(cell["by"], cell["refused"]) for cell in cells if "refused" in cell}
    return sorted(found, key=lambda one: (not one[0].startswith("rule "), one))


def _shown(cell: Mapping[str, Any], reasons: list[tuple[str, str]]) -> str:
    if "refused" in cell:
        return f"[{reasons.index((cell['by'], cell['refused'])) + 1}]"
    if "red" in cell:
        return f"**RED** {cell['red']}"
    left_out = f" (tie {', '.join(map(str, cell['ties']))})" if "ties" in cell else ""
    return f"{cell['off']:.0e}{left_out}"


def _explained(rows: Mapping[str, Any], reasons: list[tuple[str, str]]) -> Iterator[str]:
    """Every reason in the words of the refusal itself, whose they are, and for which rows."""
    kinds = (
        ("By a rule of [dsft/rules.py](../dsft/rules.py), when the run is composed:", True),
        ("By the maths of a part, on meta, before a weight is loaded:", False),
    )
    yield from ["", "## What is refused, and why"] if reasons else []
    for title, is_rule in kinds:
        mine = [(number, one) for number, one in enumerate(reasons, 1) if one[0].startswith("rule ") is is_rule]
        yield from ["", title, ""] if mine else []
        for number, (by, reason) in mine:
            where = [
                name for name, row in rows.items() if any(c.get("refused") == reason for c in row["cells"].values())
            ]
            whose = f"`{by.removeprefix('rule ')}`" if is_rule else f"[{by}](../{by})"
            yield f"- [{number}] {whose}: {reason}. Rows: {', '.join(where)}."
