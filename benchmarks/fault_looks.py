"""What must lie in a run folder after a start."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.run_folders import events, lines


def steps_of(run: Path) -> list[int]:
    """Steps that have checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-????????"))


def unpublished(run: Path, said: str) -> Iterator[str]:
    """No result, and the terminal names the folder where it lies and the way out."""
    if (run / "adapter").exists():
        yield "a result was published"
    if not re.search(r"adapter\.tmp-\d+", said) or "checkpoint.verify_result=false" not in said:
        yield f"does not name the unpublished folder and the way out: {said.strip().splitlines()[-2:]}"


def one_result(run: Path, said: str) -> Iterator[str]:
    """One result and nothing half."""
    there = sorted(path.name for path in run.glob("adapter*"))
    if there != ["adapter"]:
        yield f"there is {', '.join(there) or 'no result'}"


def one_line(run: Path, said: str) -> Iterator[str]:
    """A refusal is one line."""
    shown = [line for line in said.splitlines() if line.strip()]
    if len(shown) != 1:
        yield f"{len(shown)} lines: {shown[-2:]}"


def all_in_place(run: Path, said: str) -> Iterator[str]:
    """The checkpoints of a run of six steps, and what it recorded."""
    if not {3, 6} <= set(steps_of(run)):
        yield f"there are checkpoints {steps_of(run)}"
    if any((run / "quarantine").glob("step-*")):
        yield "something was set aside"
    if (found := [line["step"] for line in lines(run / "metrics.jsonl") if "loss" in line])[:6] != [1, 2, 3, 4, 5, 6]:
        yield f"metrics.jsonl has steps {found}"


def all_steps_once(run: Path, said: str) -> Iterator[str]:
    """metrics.jsonl has each step once."""
    found = [line["step"] for line in lines(run / "metrics.jsonl") if "loss" in line]
    if found != list(range(1, len(found) + 1)):
        yield f"metrics.jsonl has steps {found}"


def late_save_told(run: Path, said: str) -> Iterator[str]:
    """A save that is late is an event."""
    if not events(run, "save_late"):
        yield "no event save_late"


def milestones(run: Path, said: str, *, every: int = 4) -> Iterator[str]:
    """The first checkpoint of each window of so many steps is there, and besides the newest."""
    saved = [event["step"] for event in events(run, "save")]
    first = {min(step for step in saved if step // every == window) for window in {step // every for step in saved}}
    wanted = sorted({step for step in first if step >= every} | {max(saved)})
    if steps_of(run) != wanted:
        yield f"saved {saved}, there are {steps_of(run)}, should be {wanted}"


def begun_anew(run: Path, said: str) -> Iterator[str]:
    """What was there before lies whole in before-1, and the configuration says nothing of it."""
    before = run / "before-1"
    names = ("metrics.jsonl", "samples.jsonl", "events.jsonl", "status.json", "checkpoints/step-00000006")
    if gone := [name for name in names if not (before / name).exists()]:
        yield f"before-1 lacks {', '.join(gone)}"
    if (run / "config.yaml").is_file() and re.search(r"anew: true", (run / "config.yaml").read_text()):
        yield "config.yaml says resume.anew: true"


def resumed_from(*wanted: int) -> Callable[[Path, str], Iterator[str]]:
    """A look: the steps from which all starts so far went on."""

    def look(run: Path, said: str) -> Iterator[str]:
        found = [event["step"] for event in events(run, "resume")]
        if found != list(wanted):
            yield f"resumed from {found}, should from {list(wanted)}"

    return look


def verified(run: Path, said: str) -> Iterator[str]:
    """verified.json of the result says that it is the same."""
    path = run / "adapter" / "verified.json"
    found = json.loads(path.read_text()).get("same") if path.is_file() else "nothing"
    if found is not True:
        yield f"verified.json says {found}"
