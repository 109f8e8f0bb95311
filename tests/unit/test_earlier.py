"""A folder that begins anew keeps all that was there in before-N, whatever kills the process that moves it."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsft import earlier

FILES = (
    "config.yaml", "overrides.yaml", "plan.json", "provenance.json", "status.json", "metrics.jsonl", "samples.jsonl",
    "events.jsonl", "adapter/adapter_model.safetensors", "adapter.old-1/x", "quarantine/step-00000001/reason.json",
    "checkpoints/lease-000006", "checkpoints/lease-000007", "checkpoints/step-00000003/manifest.json",
    "checkpoints/step-00000006/manifest.json", "checkpoints/crashes/step-00000006.attempt-1", "logs/rank-0.log",
)  # fmt: skip
STAY = ("config.yaml", "checkpoints/lease-000006", "checkpoints/lease-000007", "logs/rank-0.log")

KILLED = """
import sys
from pathlib import Path
from dsft import earlier
from tests.unit.killing import kill_at_each_call

kill_at_each_call(
    Path(sys.argv[1]), Path(sys.argv[2]), ("open", "rename", "mkdir", "copyfile"), getattr(earlier, sys.argv[3])
)
"""


def run_of(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def kill_at_each_call(base: Path, cases: Path, move: str) -> list[Path]:
    cases.mkdir()
    command = [sys.executable, "-c", KILLED, str(base), str(cases), move]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(cases.iterdir())


def test_what_was_there_moves_and_the_leases_stay(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, *FILES)
    assert earlier.target(run_dir) == run_dir / "before-1"
    assert earlier.begin_anew(run_dir) == run_dir / "before-1"
    there = content(run_dir)
    moved = {f"before-1/{name}" for name in FILES if name not in STAY} | {"before-1/config.yaml"}
    assert there.keys() == moved | set(STAY)
    assert all(name.removeprefix("before-1/") == text for name, text in there.items())


def test_the_next_one_goes_beside_it_and_an_empty_run_goes_nowhere(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, *FILES)
    earlier.begin_anew(run_dir)
    assert earlier.begin_anew(run_dir) is None
    run_of(run_dir, "plan.json", "provenance.json")
    assert earlier.begin_anew(run_dir) is None
    run_of(run_dir, "status.json")
    assert earlier.begin_anew(run_dir) == run_dir / "before-2"
    assert content(run_dir / "before-2").keys() == {"config.yaml", "plan.json", "provenance.json", "status.json"}
    assert earlier.begin_anew(tmp_path / "none") is None


def test_a_kill_at_any_call_while_it_moves_is_finished_by_the_next_start(tmp_path: Path) -> None:
    base = run_of(tmp_path / "base", *FILES)
    whole = run_of(tmp_path / "whole", *FILES)
    earlier.begin_anew(whole)
    cases = kill_at_each_call(base, tmp_path / "cases", "begin_anew")
    assert len(cases) > 20
    for run_dir in cases:
        before, begun = content(run_dir), earlier.unfinished(run_dir)
        untouched, done = before == content(base), before == content(whole)
        assert begun or untouched or done, run_dir.name
        earlier.begin_anew(run_dir)
        assert content(run_dir) == content(whole), run_dir.name
        assert not earlier.unfinished(run_dir)


def test_records_alone_move_if_they_hold_anything(tmp_path: Path) -> None:
    assert earlier.set_records_aside(tmp_path) is None
    (tmp_path / "metrics.jsonl").touch()
    assert earlier.set_records_aside(tmp_path) is None
    run_of(tmp_path, "metrics.jsonl", "samples.jsonl", "events.jsonl", "status.json")
    assert earlier.set_records_aside(tmp_path) == tmp_path / "before-1"
    assert content(tmp_path).keys() == {
        "before-1/metrics.jsonl", "before-1/samples.jsonl", "events.jsonl", "status.json"
    }  # fmt: skip


def test_a_kill_while_records_move_loses_none_and_nothing_begins_anew_for_it(tmp_path: Path) -> None:
    base = run_of(tmp_path / "base", "metrics.jsonl", "samples.jsonl", "status.json")
    for run_dir in kill_at_each_call(base, tmp_path / "cases", "set_records_aside"):
        assert not earlier.unfinished(run_dir)
        earlier.set_records_aside(run_dir)
        assert content(run_dir).keys() == {"before-1/metrics.jsonl", "before-1/samples.jsonl", "status.json"}


@pytest.mark.parametrize("names", [("before-1", "before-3.anew"), ("before-3",), ("before-3", "before-x")])
def test_numbers_rise(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    run_of(tmp_path, "metrics.jsonl")
    assert earlier.set_records_aside(tmp_path) == tmp_path / "before-4"
