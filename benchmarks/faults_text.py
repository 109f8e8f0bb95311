"""The matrix of faults as data, dsft/faults.json, and as a page that is written from it, docs/faults.md."""

import hashlib
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.damages import damages
from benchmarks.fault_layouts import LAYOUTS
from benchmarks.machine import hardware

ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "dsft" / "faults.json", ROOT / "docs" / "faults.md"
CODE = ("dsft", "conf", "launchers", "benchmarks")
"""What an outcome depends on."""

RIGHT = "right"

HEAD = """\
# The matrix of faults

What a run promises when something breaks, tried under every layout. It is the twin of
[the equality matrix](matrix.md): that one says that the numbers are right, this one that they stay so.

**Damages.** A run of six steps with checkpoints of steps 1, 3 and 6 is damaged in one of the ways below, and started
again. *right* means, on every rank: the step that had to be loaded was loaded (the digest of all parameters, buffers
and moments is that of an undamaged load of the same step); the event `quarantine` names the damaged file; `quarantine/`
holds what was set aside, byte for byte; and everything else in the run folder is as it was. Where nothing may be
loaded, the start refused in the words that are promised and nothing was moved. All damages of a layout are tried in one
group of processes, whose ranks meet once. Checkpoints of `single x1` were written by two ranks under fsdp. Half of the
layouts train LoRA on a tiny Llama, the others all of a tiny Llama or GPT-2.

**Starts.** Real starts of `python -m dsft.run`, a fault planted in them by
[the planting tool](../benchmarks/plants.py): a function, a rank, which call, and what happens there. Each row is one
run; its starts are made one after the other, and after the last the run must be bit-equal (result, optimizer state,
examples, losses) to one of the same layout that had no fault, unless the row is about a start that must not go on. Exit
code, status.json with its reason, the words of the terminal and the folder are looked at after each. The shared part of
every command is left out: a tiny Llama, LoRA, six steps, a checkpoint every three, `strategy=ddp` on two ranks.

The campaign of faults at random moments is in [benchmarks/results/faults.md](../benchmarks/results/faults.md).
"""


def origin() -> dict[str, str]:
    """When, of what code, on what machine: a digest of the code, the commit (+ where files differ from it)."""
    files = sorted(file for place in CODE for file in (ROOT / place).rglob("*") if file.suffix in (".py", ".yaml"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    changed = "+" if _git("status", "--porcelain", "--", *CODE, ":!dsft/*.json", ":!benchmarks/results") else ""
    commit = (_git("rev-parse", "--short", "HEAD") or "unknown") + changed
    today = datetime.now(UTC).date().isoformat()
    return {"code": digest.hexdigest()[:12], "commit": commit, "machine": hardware(), "date": today}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def merge(
    damaged: Mapping[str, Mapping[str, str]], starts: Mapping[str, Any], here: Mapping[str, str], rows: Sequence[str],
    *, data: Path = DATA, page_at: Path = PAGE,
) -> int:  # fmt: skip
    """Put what was found here among what earlier runs found, write data and page; 1 if any cell is red.

    damaged: damage -> layout -> verdict; starts: row and ranks -> what `play` gave; rows: all of these that there are,
    others are dropped, as are damages that are no longer tried.
    """
    old = read(data) if data.is_file() else {"origins": {}, "damages": {}, "starts": {}}
    code = here["code"]
    found: dict[str, Any] = {}
    for name in [damage.name for damage in damages(2, 2)]:
        fresh = {layout: [said, code] for layout, said in damaged.get(name, {}).items()}
        if cells := {**old["damages"].get(name, {}), **fresh}:
            found[name] = {layout: cells[layout] for layout in LAYOUTS if layout in cells}
    known = {**old["starts"], **{name: _kept(one, code) for name, one in starts.items()}}
    played = {name: known[name] for name in rows if name in known}
    used = {cell[1] for cells in found.values() for cell in cells.values()} | {row["code"] for row in played.values()}
    origins = {**old["origins"], code: {key: value for key, value in here.items() if key != "code"}}
    content = {
        "origins": {key: value for key, value in origins.items() if key in used},
        "damages": found,
        "starts": played,
    }
    data.write_text(as_json(content))
    page_at.write_text(page(content))
    bad = red(content)
    print(f"{data}: {len(found)} damages, {len(played)} rows of starts, {len(bad)} red; {page_at}")
    return int(bool(bad))


def _kept(one: Mapping[str, Any], code: str) -> dict[str, Any]:
    starts = [
        {key: value for key, value in start.items() if value not in (None, [], "")} for start in one["starts"]
    ]  # fmt: skip
    return {"promise": one["promise"], "wrong": one["wrong"], "starts": starts, "code": code}


def read(path: Path = DATA) -> dict[str, Any]:
    """The data as they were written."""
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def as_json(data: Mapping[str, Any]) -> str:
    """A damage or a row of starts per line."""
    parts = [f' "origins": {json.dumps(data["origins"])}']
    for key in ("damages", "starts"):
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in data[key].items())
        parts.append(f' "{key}": {{\n{rows}\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def red(data: Mapping[str, Any]) -> list[str]:
    """Names of the cells and rows that are not right."""
    cells = [
        f"{name}, {layout}: {cell[0]}"
        for name, row in data["damages"].items() for layout, cell in row.items() if cell[0] != RIGHT
    ]  # fmt: skip
    return [*cells, *[f"{name}: {'; '.join(row['wrong'])}" for name, row in data["starts"].items() if row["wrong"]]]


def page(data: Mapping[str, Any]) -> str:
    """docs/faults.md."""
    cells = sum(len(row) for row in data["damages"].values())
    made = (
        f"{len(data['damages'])} damages, {cells} cells; {len(data['starts'])} rows of real starts, "
        f"{sum(len(row['starts']) for row in data['starts'].values())} starts; red: {len(red(data))}. Made by "
        "`make faults`."
    )
    parts = (_origins(data), [""], _promises(data), _damages(data), _starts(data))
    return "\n".join([HEAD, made, "", *(line for part in parts for line in part)]) + "\n"


def _origins(data: Mapping[str, Any]) -> Iterator[str]:
    for code, at in data["origins"].items():
        more = ", with changes" if at["commit"].endswith("+") else ""
        commit = at["commit"].removesuffix("+")
        yield f"- {at['date']}, commit {commit}{more} (code {code}), {at['machine']}."


def _layouts(data: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(layout for row in data["damages"].values() for layout in row))


def _promises(data: Mapping[str, Any]) -> Iterator[str]:
    """Promise x layout: how many are right, of how many. The starts are one column for each number of ranks."""
    tried: dict[str, dict[str, list[bool]]] = {}
    for damage in damages(2, 2):
        for layout, (said, _) in data["damages"].get(damage.name, {}).items():
            tried.setdefault(damage.promise, {}).setdefault(layout, []).append(said == RIGHT)
    for name, row in data["starts"].items():
        ranks = f"starts x{name.rpartition(' x')[2]}"
        tried.setdefault(row["promise"], {}).setdefault(ranks, []).append(not row["wrong"])
    columns = [*_layouts(data), *sorted({name for row in tried.values() for name in row} - set(_layouts(data)))]
    yield from ["## Promises", "", "Right, of how many were tried.", ""]
    yield from ["| promise | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for promise, row in tried.items():
        shown = [f"{sum(row[name])} of {len(row[name])}" if name in row else "" for name in columns]
        yield f"| {promise} | {' | '.join(shown)} |"


def _damages(data: Mapping[str, Any]) -> Iterator[str]:
    layouts = _layouts(data)
    yield from ["", "## Damages", "", "| damage | " + " | ".join(layouts) + " |", "|---|" + "---|" * len(layouts)]
    for name, row in data["damages"].items():
        shown = [row[layout][0] if layout in row else "" for layout in layouts]
        yield (
            f"| {name} | " + " | ".join(one if one in (RIGHT, "") else f"**RED** {_flat(one)}" for one in shown) + " |"
        )


def _starts(data: Mapping[str, Any]) -> Iterator[str]:
    yield from [
        "", "## Starts", "",
        "Seconds in brackets are those from the fault to the end of the command.", "",
        "| what, ranks | starts: words, fault, exit code, seconds | outcome |", "|---|---|---|",
    ]  # fmt: skip
    for name, row in data["starts"].items():
        starts = "<br>".join(f"{number}. {_start(start)}" for number, start in enumerate(row["starts"], 1))
        outcome = f"**RED** {_flat('; '.join(row['wrong']))}" if row["wrong"] else RIGHT
        yield f"| {name} | {starts} | {outcome} |"


def _start(start: Mapping[str, Any]) -> str:
    words = f"`{start['command']}` " if "command" in start else ""
    plants = "".join(f"[{_flat(plant)}] " for plant in start.get("plants", []))
    after = f" ({start['after_s']} s)" if "after_s" in start else ""
    return f"{words}{plants}{start.get('code', 'no end')}, {start['seconds']} s{after}"


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:300]
