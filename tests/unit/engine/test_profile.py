"""The profile of real steps of a tiny model: each part is found, all time is given away, no number changes."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler_util import FunctionEvent
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
from dsft.engine.parts import STEP, Part, attributed, links_of, mark, seconds_by_part, shared_out
from dsft.engine.progress import Progress
from dsft.engine.resume import keeper_for
from dsft.engine.step import train_step
from dsft.engine.stop import StopFlag
from dsft.models.attention import NAME, register

ALWAYS = {Part.GEMM, Part.ATTENTION, Part.HEAD, Part.COPIES, Part.ELEMENTWISE, Part.DATA, Part.OPTIMIZER, Part.IDLE}
METHODS = {
    "full": ALWAYS,
    "lora": ALWAYS | {Part.ADAPTER},
    "qlora": ALWAYS | {Part.ADAPTER, Part.UNPACKING},
}

TRACE_NS = 1_700_000_000_000_000_000
"""When a made-up profile began."""


class Seen:
    """A watch that keeps what it is told, and asks for a stop after a step."""

    def __init__(self, stop: StopFlag, stop_at: int | None) -> None:
        self.stop, self.stop_at = stop, stop_at
        self.steps: list[Mapping[str, float]] = []
        self.events: dict[str, Mapping[str, object]] = {}

    def begin_step(self) -> None: ...

    def step(self, step: int, values: Mapping[str, float], ids: list[str]) -> None:
        self.steps.append(values)
        if step == self.stop_at:
            self.stop.signal = "SIGTERM"

    def evaluation(self, step: int, evaluation: Evaluation) -> None: ...

    def event(self, event: str, step: int, details: Mapping[str, object]) -> None:
        self.events[event] = details


def _session(folder: Path, *words: str) -> tuple[Session, Dataset]:
    composed = compose([
        "model=tiny", "data=reasoning_gym", "data.size=32", "data.eval_size=0", "train.precision=fp32",
        "train.global_batch_size=4", "train.steps=4", "launcher=local", "method=lora", "optim.lr=1e-3",
        "checkpoint=none", "train.micro_batch_tokens=250", f"run_dir={folder}", *words,
    ])  # fmt: skip
    files = composed.run.model.resolve()
    data = open_data(composed.run.data, files.tokenizer(), max_length=512, seed=0)
    return assemble(composed.run, files, World(0, 1, 0, torch.device("cpu"))), data


def _fit(session: Session, data: Dataset, *, done: int = 0, stop_at: int | None = None) -> Seen:
    stop = StopFlag()
    seen = Seen(stop, stop_at)
    keeper = keeper_for(session, Path("absent"), Identity("run", "config", "base", "data"), None, saved=0)
    fit(session, data, seen, stop, keeper, Progress(total=4, step=done))
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_each_part_is_found(method: str, tmp_path: Path) -> None:
    session, data = _session(tmp_path, f"method={method}")
    found = {part for event, part, in_step in _attributed(session, data) if in_step and event.self_cpu_time_total > 0}
    assert found - {Part.OTHER} == METHODS[method]


@pytest.mark.parametrize("again", ["none", "full"])
def test_a_backward_operation_belongs_to_the_part_of_its_forward(again: str, tmp_path: Path) -> None:
    session, data = _session(tmp_path, "method=qlora", f"train.gradient_checkpointing={again}")
    nodes: dict[str, set[Part]] = {}
    for event, part, _ in _attributed(session, data):
        if (event.name.startswith("aten::") and "_backward" in event.name) or event.name.endswith("Backward"):
            nodes.setdefault(event.name, set()).add(part)
    scores = [parts for name, parts in nodes.items() if "scaled_dot_product" in name or "softmax" in name]
    assert {Part.ATTENTION} in scores
    assert all(parts <= {Part.ATTENTION, Part.HEAD} for parts in scores)
    assert nodes["_ProductBackward"] == {Part.GEMM}
    assert nodes["_DownBackward"] == nodes["_UpBackward"] == {Part.ADAPTER}
    assert nodes["_ScoreBackward"] == {Part.HEAD}
    assert nodes["aten::silu_backward"] == {Part.ELEMENTWISE}


def test_all_time_of_the_steps_is_given_away(tmp_path: Path) -> None:
    session, data = _session(tmp_path, "train.profile=2")
    details = _fit(session, data).events["profile"]
    table = (tmp_path / "profile" / "table.md").read_text()
    assert details["table"] == table
    assert "2 steps went: 2 to 3" in table
    with gzip.open(tmp_path / "profile" / "trace-rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [event["dur"] / 1e6 for event in events if event.get("name") == STEP]
    cells = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    rows = {name.strip(): float(seconds) for _, name, seconds, *_ in cells}
    assert [*rows] == [*Part, "all"]
    assert len(steps) == 2
    assert sum(steps) == pytest.approx(rows["all"], abs=1e-3)  # a row has three digits
    assert sum(rows[part] for part in Part) == pytest.approx(rows["all"], abs=1e-3 * len(Part))


@pytest.mark.parametrize("again", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_no_number_changes_and_no_mark_stays(again: str, tmp_path: Path) -> None:
    words = (f"train.gradient_checkpointing={again}", "method.dropout=0.1")
    register()
    attention, wait = AttentionInterface()[NAME], vars(dist.Work)["wait"]
    runs = []
    for steps in (0, 2):
        session, data = _session(tmp_path, *words, f"train.profile={steps}")
        before = _forwards(session)
        seen = _fit(session, data)
        learned = {name: param.detach() for name, param in session.model.named_parameters() if param.requires_grad}
        runs.append(([(line["loss"], line["grad_norm"]) for line in seen.steps], learned))
        assert _forwards(session) == before
        assert ("profile" in seen.events) is (steps > 0)
    (plain, weights), (watched, same) = runs
    assert plain == watched
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert AttentionInterface()[NAME] is attention
    assert vars(dist.Work)["wait"] is wait


def test_what_is_left_of_a_run_is_profiled_and_said(tmp_path: Path) -> None:
    session, data = _session(tmp_path, "train.profile=3")
    events = _fit(session, data, done=2).events
    assert events["profile_short"] == {"wanted": 3, "steps": 1}
    assert "1 steps went: 4 to 4" in str(events["profile"]["table"])
    events = _fit(session, data, done=3).events
    assert events == {"profile_short": {"wanted": 3, "steps": 0}}


def test_a_loop_that_is_left_before_writes_what_it_saw(tmp_path: Path) -> None:
    session, data = _session(tmp_path, "train.profile=3")
    events = _fit(session, data, stop_at=3).events
    assert "2 steps went: 2 to 3" in str(events["profile"]["table"])


def test_a_disk_that_takes_nothing_does_not_end_the_run(tmp_path: Path) -> None:
    session, data = _session(tmp_path, "train.profile=1")
    (tmp_path / "profile").write_text("in the way")
    seen = _fit(session, data)
    assert len(seen.steps) == 4
    assert str(seen.events["profile"]["what"]).startswith(f"not written to {tmp_path / 'profile'}: ")


def test_of_things_at_once_the_one_that_computes_counts() -> None:
    spans = [
        (1.0, 4.0, Part.COMMUNICATION),
        (3.0, 5.0, Part.GEMM),
        (4.5, 6.0, Part.HEAD),
        (8.0, 12.0, Part.OPTIMIZER),
        (20.0, 30.0, Part.GEMM),
    ]
    found = shared_out(0.0, 10.0, spans)
    assert {part: seconds for part, seconds in found.items() if seconds} == {
        Part.IDLE: 1.0 + 2.0, Part.COMMUNICATION: 2.0, Part.GEMM: 2.0, Part.HEAD: 1.0, Part.OPTIMIZER: 2.0,
    }  # fmt: skip


def _raw(event: FunctionEvent, link: int) -> SimpleNamespace:
    """What Kineto says of the same event."""
    said = {
        "device_type": event.device_type, "correlation_id": event.id, "linked_correlation_id": link,
        "start_ns": TRACE_NS + round(event.time_range.start * 1000),
    }  # fmt: skip
    return SimpleNamespace(**{name: (lambda value=value: value) for name, value in said.items()})


def test_a_kernel_is_given_to_the_operation_that_started_it_without_links_in_its_events() -> None:
    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    told = [  # number, name, device, beginning and end in microseconds, number of the operation that started it
        (1, STEP, cpu, 0.0, 100.0, 0),
        (2, "aten::mm", cpu, 10.0, 20.0, 0),
        (3, "cudaLaunchKernel", cpu, 11.0, 12.0, 2),  # its own number is that of another operation
        (3, "aten::silu", cpu, 30.0, 40.0, 0),
        (4, "cudaLaunchKernel", cpu, 31.0, 32.0, 3),
        (3, "gemm_kernel", cuda, 15.5, 35.5, 2),
        (4, "elementwise_kernel", cuda, 40.0, 70.0, 3),
        (5, "ncclDevKernel_AllGather", cuda, 60.0, 90.0, 0),
    ]
    events, raw = [], []
    for number, name, device, start, end, link in told:
        event = FunctionEvent(number, name, 1, start, end, device_type=device)
        vars(event).pop("linked_correlation_id", None)  # torch 2.11 has none
        events.append(event)
        raw.append(_raw(event, link))
    for inside, outside in ((1, 0), (3, 0), (2, 1), (4, 3)):
        events[inside].set_cpu_parent(events[outside])
        events[outside].append_cpu_child(events[inside])
    results = SimpleNamespace(events=lambda: raw, trace_start_ns=lambda: TRACE_NS)
    found = {part: seconds * 1e6 for part, seconds in seconds_by_part(events, links_of(results)).items() if seconds}
    assert found == pytest.approx(
        {Part.GEMM: 20.0, Part.ELEMENTWISE: 30.0, Part.COMMUNICATION: 20.0, Part.IDLE: 15.5 + 4.5 + 10.0}
    )


def _forwards(session: Session) -> list[tuple[object, object]]:
    return [(vars(module).get("forward"), vars(module).get("decode")) for module in session.model.modules()]


def _attributed(session: Session, data: Dataset) -> list[tuple[Any, Part, bool]]:
    with marked(session.model, session.anatomy), profile(acc_events=True) as profiler, record_function(STEP):
        with mark(Part.DATA):
            _, batches = step_batches(session, data, 1)
        train_step(session, batches, 1, 1.0)
    return attributed(profiler.events())
