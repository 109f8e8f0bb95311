"""The profile of real steps of a tiny model: each part is found, all time is given away, no number changes."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile, record_function
from transformers import AttentionInterface

from dsft.checkpoint.manifest import Identity
from dsft.comm.world import World
from dsft.compose import compose
from dsft.data.open import Dataset, open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.evaluate import Evaluation
from dsft.engine.loop import fit, step_batches
from dsft.engine.marks import marked
from dsft.engine.parts import STEP, Part, attributed, shared_out
from dsft.engine.progress import Progress
from dsft.engine.resume import keeper_for
from dsft.engine.step import train_step
from dsft.engine.stop import StopFlag

ALWAYS = {Part.GEMM, Part.ATTENTION, Part.HEAD, Part.COPIES, Part.ELEMENTWISE, Part.DATA, Part.OPTIMIZER, Part.IDLE}
METHODS = {
    "full": ALWAYS,
    "lora": ALWAYS | {Part.ADAPTER},
    "dora": ALWAYS | {Part.ADAPTER},
    "qlora": ALWAYS | {Part.ADAPTER, Part.UNPACKING},
}


class Seen:
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []
        self.events: dict[str, Mapping[str, object]] = {}

    def begin_step(self) -> None: ...

    def step(self, step: int, values: Mapping[str, float], ids: list[str]) -> None:
        self.steps.append(values)

    def evaluation(self, step: int, evaluation: Evaluation) -> None: ...

    def event(self, event: str, step: int, details: Mapping[str, object]) -> None:
        self.events[event] = details


def _session(folder: Path, *words: str) -> tuple[Session, Dataset]:
    composed = compose([
        "model=tiny", "data=reasoning_gym", "data.size=32", "data.eval_size=0", "train.precision=fp32",
        "train.global_batch_size=4", "train.steps=4", "launcher=local", "method=lora", "optim.lr=1e-3",
        "checkpoint=none", "train.micro_batch_tokens=60", f"run_dir={folder}", *words,
    ])  # fmt: skip
    files = composed.run.model.resolve()
    data = open_data(composed.run.data, files.tokenizer(), max_length=512, seed=0)
    return assemble(composed.run, files, World(0, 1, 0, torch.device("cpu"))), data


def _fit(session: Session, data: Dataset, total: int = 4, done: int = 0) -> Seen:
    seen = Seen()
    keeper = keeper_for(session, Path("absent"), Identity("run", "config", "base", "data"), None, saved=0)
    fit(session, data, seen, StopFlag(), keeper, Progress(total=total, step=done))
    return seen


def _rows(table: str) -> dict[str, float]:
    cells = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    return {name.strip(): float(seconds) for _, name, seconds, *_ in cells[1:]}


@pytest.mark.parametrize("method", METHODS)
def test_each_part_is_found_and_all_time_is_given_away(method: str, tmp_path: Path) -> None:
    session, data = _session(tmp_path, f"method={method}", "train.profile=2")
    details = _fit(session, data).events["profile"]
    table = (tmp_path / "profile" / "table.md").read_text()
    assert details["table"] == table
    assert "2 steps went: 2 to 3" in table
    with gzip.open(tmp_path / "profile" / "trace-rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [event["dur"] / 1e6 for event in events if event.get("name") == STEP]
    rows = _rows(table)
    assert len(steps) == 2
    assert sum(steps) == pytest.approx(rows["all"], abs=1e-3)  # rows show three digits
    assert sum(rows[part] for part in Part) == pytest.approx(rows["all"], abs=1e-3 * len(Part))
    shares = {event for event, part, inside in _attributed(session, data) if inside for event in [part]}
    assert shares - {Part.OTHER} == METHODS[method]


def _attributed(session: Session, data: Dataset) -> list[tuple[Any, Part, bool]]:
    with marked(session.model, session.anatomy), profile() as profiler, record_function(STEP):
        from dsft.engine.parts import mark

        with mark(Part.DATA):
            _, batches = step_batches(session, data, 1)
        train_step(session, batches, 1, 1.0)
    return attributed(profiler.events())
