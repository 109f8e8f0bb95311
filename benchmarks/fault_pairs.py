"""Two starts of one run at the same time: a run that is alive is not taken over, one that is dead is."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.fault_looks import all_steps_once
from benchmarks.fault_starts import Row, Start, command, composed, ended, prepare, reference
from benchmarks.kills import steps_recorded
from benchmarks.plants import Plant, environment
from benchmarks.run_folders import differences

SLOW = Plant("dsft.objectives.sft:SFT.losses", "sleep", "0.3", nth=0, rank=0)
HELD = r"process \d+ on "
LONG = ("train.steps=40",)
PROMISE = "A living run is not taken over"

UNHARMED, KILLED, ASLEEP = "the second is refused", "kill -9 of the first", "the first sleeps"

PAIRS = tuple(
    Row(f"two shells: {name}", "issue, 6", PROMISE, (Start(LONG),), ranks=(1, 2)) for name in (UNHARMED, KILLED, ASLEEP)
)


def play_pair(row: Row, ranks: int, folder: Path) -> dict[str, Any]:
    """Start the run, start it again once it trains, and look at both; what the journal keeps of it."""
    prepare(folder)
    run = folder / re.sub(r"\W+", "-", f"{row.name} x{ranks}") / "run"
    shutil.rmtree(run.parent, ignore_errors=True)
    run.parent.mkdir(parents=True)
    typed, began = [*command(composed(row, row.starts[0], ranks, folder)), f"run_dir={run}"], time.monotonic()
    with (run.parent / "first").open("w") as said:
        first = subprocess.Popen(
            typed, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment([SLOW])},
        )  # fmt: skip
    try:
        wrong = list(_wrong(row.name, first, typed, run))
    finally:
        if first.poll() is None:
            first.kill()
            first.wait()
    if not wrong:
        wrong = [*all_steps_once(run, ""), *differences(reference(row, ranks, folder), run)[:3]]
    if not wrong:
        shutil.rmtree(run.parent)
    seconds = round(time.monotonic() - began, 1)
    shown = {"command": " ".join(LONG), "plants": [f"the same command once more: {row.name.partition(': ')[2]}"]}
    return {"wrong": wrong, "starts": [{**shown, "code": first.returncode, "seconds": seconds, "after_s": None}],
            "seconds": seconds}  # fmt: skip


def _wrong(name: str, first: "subprocess.Popen[bytes]", typed: list[str], run: Path) -> Iterator[str]:
    if not _trains(first, run):
        yield f"the first ended with {first.returncode} before it trained: {_said(run)}"
        return
    if name.endswith(KILLED):
        first.kill()  # its ranks die with it
        first.wait()
        yield from _second(typed, run, 0, "resumed from")
        return
    if name.endswith(ASLEEP):
        first.send_signal(signal.SIGSTOP)
    yield from _second(typed, run, 2, HELD)
    if name.endswith(ASLEEP):
        first.send_signal(signal.SIGCONT)
    if first.wait(timeout=240) != 0:
        yield f"the first ended with {first.returncode}: {_said(run)}"


def _trains(first: "subprocess.Popen[bytes]", run: Path) -> bool:
    until = time.monotonic() + 120
    while first.poll() is None and time.monotonic() < until:
        if steps_recorded(run) >= 4:
            return True
        time.sleep(0.02)
    return False


def _second(typed: list[str], run: Path, code: int, says: str) -> Iterator[str]:
    found, said = ended(typed, {}, run.parent / "second", limit_s=240.0)
    if found != code or not re.search(says, said):
        yield f"the second ends with {found}, should with {code} and say {says!r}; it said {said.strip()[-400:]}"


def _said(run: Path) -> str:
    return (run.parent / "first").read_text(errors="replace").strip()[-400:]
