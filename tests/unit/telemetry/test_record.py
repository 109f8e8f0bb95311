"""The run folder's files: valid JSON, whole lines, every step once."""

import json
import math
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsft.telemetry.record import RunRecord, Status, read_lines, read_status, rewind, write_status

RUNNING = Status(state="running", step=3, attempts=1, checkpoint=None, reason=None, wandb_id="abc")


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def opened(run_dir: Path, *, resumed_from: int = 0) -> RunRecord:
    def refuse(error: OSError) -> None:
        raise error

    record = RunRecord(run_dir, refuse)
    record.resume(resumed_from)
    return record


def write(run_dir: Path, *, last: int, resumed_from: int = 0) -> None:
    record = opened(run_dir, resumed_from=resumed_from)
    for step in range(resumed_from + 1, last + 1):
        record.metrics(step, {"loss": 1.0 / step})
        record.samples(step, [f"a:{step}", f"a:{step + 1}"])
    record.event("save", last, {"bytes": 10})
    record.close()


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    record = opened(tmp_path)
    record.metrics(1, {"loss": 2.0, "lr": 1e-3})
    record.samples(1, ["a:0"])
    record.event("start", 0, {"host": "n1"})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0, "lr": 1e-3}]
    assert read_lines(tmp_path / "samples.jsonl") == [{"step": 1, "ids": ["a:0"]}]
    (event,) = read_lines(tmp_path / "events.jsonl")
    assert list(event) == ["time", "event", "step", "host"]
    assert event["time"].endswith("+00:00")
    record.close()


def test_numbers_that_json_lacks_are_valid_json_and_come_back(tmp_path: Path) -> None:
    record = opened(tmp_path)
    record.metrics(1, {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    record.event("nonfinite", 1, {"losses": [math.nan, 1.0]})
    record.close()

    def refuse(name: str) -> float:
        raise AssertionError(name)

    for name in ("metrics.jsonl", "events.jsonl"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert math.isnan(line["loss"])
    assert (line["grad_norm"], line["lr"]) == (math.inf, -math.inf)


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    write(tmp_path, last=7)
    write(tmp_path, last=9, resumed_from=4)
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 10))
    assert steps(tmp_path / "samples.jsonl") == list(range(1, 10))
    assert steps(tmp_path / "events.jsonl") == [7, 9]


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, last=3)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 2, "lo')
        assert max(steps(tmp_path / name)) == 3
    write(tmp_path, last=4, resumed_from=3)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps(tmp_path / "events.jsonl") == [3, 4]


def test_nothing_to_drop_leaves_the_file_untouched(tmp_path: Path) -> None:
    write(tmp_path, last=3)
    before = (tmp_path / "metrics.jsonl").stat()
    rewind(tmp_path / "metrics.jsonl", 3)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before.st_ino
    rewind(tmp_path / "absent.jsonl", 3)
    assert read_lines(tmp_path / "absent.jsonl") == []


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\0\0\n')
    with pytest.raises(RuntimeError, match=r"metrics.jsonl holds a damaged line"):
        opened(tmp_path, resumed_from=1)


def test_a_run_that_begins_anew_drops_everything_but_its_history(tmp_path: Path) -> None:
    record = opened(tmp_path)
    record.metrics(0, {"eval/loss": 2.0})
    record.close()
    write(tmp_path, last=3)
    opened(tmp_path).close()
    assert steps(tmp_path / "metrics.jsonl") == []
    assert steps(tmp_path / "events.jsonl") == [3]


def test_lines_wait_for_a_full_disk_and_follow_in_order(tmp_path: Path) -> None:
    told: list[OSError] = []
    record = RunRecord(tmp_path, told.append)
    record.metrics(1, {"loss": 1.0})
    with limited(to=(tmp_path / "metrics.jsonl").stat().st_size + 5):  # five bytes of the next line still fit
        record.metrics(2, {"loss": 2.0})
        record.metrics(3, {"loss": 3.0})
        record.event("save", 3, {"a long line": "x" * 100})
        assert steps(tmp_path / "metrics.jsonl") == [1]
    record.metrics(4, {"loss": 4.0})
    record.close()
    assert len(told) == 1
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps(tmp_path / "events.jsonl") == [3]


@contextmanager
def limited(*, to: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the kernel refuses the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (to, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_status_is_replaced_whole(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path, RUNNING)
    with (tmp_path / "status.json").open() as old:
        write_status(tmp_path, Status(**{**vars(RUNNING), "state": "done", "checkpoint": "step-00000003"}))
        assert json.load(old) == vars(RUNNING)  # whoever reads while it is replaced sees all of the old one
    read = read_status(tmp_path)
    assert read is not None
    assert (read.state, read.checkpoint) == ("done", "step-00000003")
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_damaged_status_is_named(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "runn')
    with pytest.raises(RuntimeError, match=r"status.json is damaged"):
        read_status(tmp_path)
    (tmp_path / "status.json").write_text('{"state": "asleep", "step": 1}')
    with pytest.raises(RuntimeError, match=r"status.json is damaged"):
        read_status(tmp_path)
