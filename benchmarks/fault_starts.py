"""Real starts of a run in which faults happen: each as the user types it, its outcome against what is promised."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.matrix_rows import write_rows
from benchmarks.plants import Plant, environment, happened
from benchmarks.run_folders import differences, words

Look = Callable[[Path, str], Iterator[str]]
"""(run folder, what the start said) -> what is wrong there."""


@dataclass(frozen=True)
class Start:
    """One start, and what must come of it. words: besides the row's; do, shell: done to the run folder before it;
    plants, shell and patterns may say {run} and {last}, the highest rank, for which a plant's rank is -1.

    code: how the command must end; alone: the same where one process does it all, as it is the rank that is killed;
    state: what status.json must say then, "" where it says nothing new; says, reason:
    patterns of the terminal and of status.json's reason; never: what the terminal must not say; look: at the folder;
    ends_s: seconds from the first plant to the end of the command, at most.
    """

    words: tuple[str, ...] = ()
    plants: tuple[Plant, ...] = ()
    do: Callable[[Path], None] | None = None
    shell: str = ""
    code: int = 0
    alone: int | None = None
    state: str = "done"
    says: str = ""
    reason: str = ""
    never: str = ""
    look: Look | None = None
    ends_s: float = 300.0


@dataclass(frozen=True)
class Row:
    """A promise that is tried by some starts of one run. number: of the report that it mends; equal: the end must be
    bit-equal to an undisturbed run of the same words and ranks.
    """

    name: str
    number: str
    promise: str
    starts: tuple[Start, ...]
    words: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (1, 2)
    equal: bool = True


def base(rows: Path, ranks: int) -> list[str]:
    """What every row trains, unless it says otherwise."""
    case = ["method=lora", f"strategy={'single' if ranks == 1 else 'ddp'}", "optim.schedule=constant"]
    return [*words(rows, case, ranks, background=True, steps=6), "train.hang_after=10"]


def write_eval(path: Path) -> None:
    """Few held-out rows whose answers can be verified, each short to generate."""
    asked = [{"question": f"What comes after {number}?", "answer": str(number + 1)} for number in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))


def play(row: Row, ranks: int, folder: Path) -> dict[str, Any]:
    """Make the starts of a row; what the journal keeps of it. folder: of all rows, where references are kept."""
    prepare(folder)
    run = folder / re.sub(r"\W+", "-", f"{row.name} x{ranks}") / "run"
    shutil.rmtree(run.parent, ignore_errors=True)
    run.parent.mkdir(parents=True)
    began, told, wrong = time.monotonic(), [], []
    for number, start in enumerate(row.starts, start=1):
        made = _made(fitted(start, run, ranks), run, row, ranks, folder)
        told.append({key: made[key] for key in ("command", "plants", "code", "seconds", "after_s")})
        wrong += [f"start {number}: {what}" for what in made["wrong"]]
        if wrong:
            break
    if row.equal and not wrong:
        wrong += [f"not as the undisturbed run: {name}" for name in differences(reference(row, ranks, folder), run)[:3]]
    if not wrong:
        shutil.rmtree(run.parent)
    return {"wrong": wrong, "starts": told, "seconds": round(time.monotonic() - began, 1)}


def prepare(folder: Path) -> None:
    """Write the rows that all train on."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "eval.jsonl").is_file():
        write_rows(folder / "rows.jsonl", 60)
        write_eval(folder / "eval.jsonl")


def composed(row: Row, start: Start, ranks: int, folder: Path) -> list[str]:
    """Overrides of a start, without its folder."""
    typed = [*base(folder / "rows.jsonl", ranks), *row.words, *start.words]
    return [word.replace("{folder}", str(folder)) for word in typed]


def reference(row: Row, ranks: int, folder: Path) -> Path:
    """The folder of an undisturbed run of the words that the last start had; made once."""
    typed = [word for word in composed(row, row.starts[-1], ranks, folder) if not word.startswith("resume.")]
    place = folder / "references" / hashlib.sha256(json.dumps(typed).encode()).hexdigest()[:12]
    if not (place / "status.json").is_file() or json.loads((place / "status.json").read_text())["state"] != "done":
        shutil.rmtree(place, ignore_errors=True)
        done = subprocess.run([*command(typed), f"run_dir={place}"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"an undisturbed run ended with {done.returncode}: {done.stderr[-2000:]}")
    return place


def command(typed: Sequence[str]) -> list[str]:
    """What is started."""
    return [sys.executable, "-m", "dsft.run", *typed]


def fitted(start: Start, run: Path, ranks: int) -> Start:
    """A start with what its plants and its shell leave open filled in."""

    def fill(text: str) -> str:
        return text.replace("{run}", str(run)).replace("{last}", str(ranks - 1))

    plants = tuple(
        replace(
            plant, value=fill(plant.value), when=fill(plant.when),
            rank=ranks - 1 if plant.rank is not None and plant.rank < 0 else plant.rank,
        )
        for plant in start.plants
    )  # fmt: skip
    killed = {} if ranks > 1 or start.alone is None else {"code": start.alone, "state": "", "says": "", "reason": ""}
    filled = {key: fill(getattr(start, key)) for key in ("shell", "says", "reason")}
    return replace(start, plants=plants, **(filled | killed))


def _made(start: Start, run: Path, row: Row, ranks: int, folder: Path) -> dict[str, Any]:
    """Start it, wait for its end, and look."""
    if start.do is not None:
        start.do(run)
    if start.shell:
        subprocess.run(start.shell, shell=True, check=True)
    fired = run.parent / "fired"
    fired.unlink(missing_ok=True)
    typed = [word.replace("{run}", str(run)) for word in composed(row, start, ranks, folder)]
    typed += [] if any(word.startswith("run_dir=") for word in typed) else [f"run_dir={run}"]
    began = time.time()
    code, said = ended(
        command(typed), environment(start.plants, fired), run.parent / "said",
        limit_s=start.ends_s + 120.0,
    )  # fmt: skip
    over, first = time.time(), min((line["time"] for line in happened(fired)), default=None)
    after = None if first is None else round(over - first, 1)
    more = [word for word in (*row.words, *start.words) if not word.startswith("data.")]
    return {
        "command": " ".join(more),
        "plants": [told(plant) for plant in start.plants],
        "code": code,
        "seconds": round(over - began, 1),
        "after_s": after,
        "wrong": list(_wrong(start, run, ranks, (code, said, after))),
    }


def ended(what: Sequence[str], env: dict[str, str], said: Path, *, limit_s: float) -> tuple[int | None, str]:
    """Exit code (None: it was still there after limit_s and was killed) and what it said."""
    with said.open("w") as out:
        process = subprocess.Popen(
            what, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env},
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # its ranks die with it
                process.send_signal(signal.SIGKILL)
                process.wait()
    return code, said.read_text(errors="replace")


def told(plant: Plant) -> str:
    """A plant in words, as the page shows it."""
    name = plant.place.partition(":")[2]
    nth = "" if plant.nth == 1 else ", every call" if plant.nth == 0 else f" no. {plant.nth}"
    where = "" if plant.rank is None else f" of rank {plant.rank}"
    value = f" {plant.value}" if plant.value and plant.what in ("raise", "sleep", "hold_gil") else ""
    return f"{name}{nth}{where}: {plant.what}{value}"


def _wrong(start: Start, run: Path, ranks: int, found: tuple[int | None, str, float | None]) -> Iterator[str]:
    code, said, after = found
    tail = " | ".join(said.strip().splitlines()[-3:])[:400]
    if start.plants and after is None:
        yield f"no plant happened; it said {tail}"
        return
    if code != start.code:
        ends = "is still there" if code is None else f"ends with {code}"
        yield f"{ends}, should end with {start.code}; it said {tail}"
        return
    if start.says and not re.search(start.says, said, re.DOTALL):
        yield f"does not say {start.says!r} but {tail}"
    if start.never and (hit := re.search(start.never, said)):
        yield f"says {hit.group()!r}"
    if after is not None and after > start.ends_s:
        yield f"ends {after} s after the fault, {start.ends_s:g} at most"
    yield from _status(start, run)
    if start.look is not None:
        yield from start.look(run, said)


def _status(start: Start, run: Path) -> Iterator[str]:
    if not start.state:
        return
    path = run / "status.json"
    status = json.loads(path.read_text()) if path.is_file() else {"state": "nothing", "reason": None}
    if status["state"] != start.state:
        yield f"status.json says {status['state']}, should say {start.state}"
    if start.reason and not re.search(start.reason, status["reason"] or "", re.DOTALL):
        yield f"status.json's reason is {status['reason']!r}, should hold {start.reason!r}"
