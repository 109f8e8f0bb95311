"""Runs that are killed, stopped, reshaped or robbed of their folder, through real processes."""

import json
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from dsft_launchers.verdict import WAITED

from benchmarks import faults
from benchmarks.faults import events
from tests.launch.processes import checkpoints, dsft, started, steps, wait_for

SHORT = ((2, "zero3"), (3, "fsdp"))
LONG = ((1, "single"), (2, "ddp"), (4, "fsdp"), (3, "zero3"), (2, "zero2"), (1, "single"))


@pytest.mark.parametrize("legs", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"])
def test_a_run_goes_on_under_other_strategies_and_numbers_of_ranks(
    legs: tuple[tuple[int, str], ...], rows: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    fixed = [*faults.words(rows, ["method=lora"], 1, background=False), "optim.schedule=constant", "checkpoint.keep=99"]
    for leg, (size, strategy) in enumerate(legs, start=1):
        done = dsft(
            *fixed, f"strategy={strategy}", f"launcher.devices={size}", f"train.steps={3 * leg}", f"run_dir={run_dir}"
        )
        assert done.returncode == 0, (strategy, done.stderr)
    reference = tmp_path / "reference"
    assert dsft(*fixed, f"train.steps={3 * len(legs)}", f"run_dir={reference}").returncode == 0
    assert [line["step"] for line in events(run_dir, "resume")] == [3 * leg for leg in range(1, len(legs))]
    assert (run_dir / "samples.jsonl").read_bytes() == (reference / "samples.jsonl").read_bytes()
    ours, theirs = (
        [line["loss"] for line in faults.lines(path / "metrics.jsonl") if "loss" in line]
        for path in (run_dir, reference)
    )
    assert len(ours) == len(theirs) == 3 * len(legs)
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) < 1e-5
    one, other = faults.saved_state(run_dir), faults.saved_state(reference)
    assert one.keys() == other.keys()
    moments = [name for name in one if name.startswith("exp_avg")]
    assert len(moments) == 84
    for name in moments:
        assert (one[name] - other[name]).norm() <= 1e-3 * other[name].norm(), name
    assert one["step"].equal(other["step"])


def test_signals_to_some_ranks_stop_all_at_one_step_with_nothing_lost(rows: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    plain = faults.words(rows, ["method=lora"], 2, background=True, steps=100_000)
    words = [word.replace("tracker=[]", "tracker=[wandb]") for word in plain]
    words += ["tracker.wandb.mode=offline", f"run_dir={run_dir}"]
    with started(*words) as run:
        wait_for(lambda: events(run_dir, "save"), run)
        ranks = [rank["pid"] for rank in events(run_dir, "start")[0]["ranks"]]
        os.kill(ranks[0], signal.SIGTERM)
        time.sleep(0.2)
        for number, pid in ((signal.SIGUSR2, ranks[1]), (signal.SIGTERM, ranks[0]), (signal.SIGUSR2, ranks[1])):
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # saved and gone already
                break
            time.sleep(0.02)
        out, _ = run.communicate(timeout=120)
    assert run.returncode == 75, out
    at = steps(run_dir)[-1]
    assert checkpoints(run_dir)[-1] == at
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "stopped"
    done = dsft(*words, f"train.steps={at + 2}")
    assert done.returncode == 0, done.stderr
    assert events(run_dir, "resume")[-1]["step"] == at
    assert steps(run_dir) == list(range(1, at + 3))
    assert json.loads((run_dir / "status.json").read_text())["wandb_id"] == status["wandb_id"]
    offline = [path.name for path in (run_dir / "wandb").glob("offline-run-*")]
    assert len(offline) == 2
    assert all(name.endswith(status["wandb_id"]) for name in offline)


def family(pid: int) -> list[int]:
    """A process, what it started, what those started, and so on."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_writer_that_slept_through_anothers_start_commits_nothing(ranks: int, rows: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*faults.words(rows, ["method=lora"], ranks, background=True, steps=100_000), f"run_dir={run_dir}"]
    with started(*words) as sleeper:
        wait_for(lambda: len(checkpoints(run_dir)) > 1, sleeper)
        wait_for(lambda: list((run_dir / "checkpoints").glob("*.tmp-*")), sleeper)
        all_of_it = family(sleeper.pid)
        for pid in all_of_it:
            os.kill(pid, signal.SIGSTOP)
        until = checkpoints(run_dir)[-1] + 20
        refused = dsft(*words, f"train.steps={until}")  # what sleeps is alive
        assert refused.returncode == 2, refused.stderr
        assert re.search(r"process \d+ on .* since .*resume\.takeover=true", refused.stderr)
        done = dsft(*words, f"train.steps={until}", "resume.takeover=true")
        assert done.returncode == 0, done.stderr
        before, metrics = checkpoints(run_dir), (run_dir / "metrics.jsonl").read_bytes()
        for pid in reversed(all_of_it):
            os.kill(pid, signal.SIGCONT)
        out, _ = sleeper.communicate(timeout=60)
    assert sleeper.returncode == 76
    assert "was taken over by process" in out
    assert checkpoints(run_dir) == before
    assert before[-1] == until
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics
    assert steps(run_dir) == list(range(1, until + 1))
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    assert events(run_dir, "takeover")
    assert "takeover: false" in (run_dir / "config.yaml").read_text()


def test_a_rank_that_hangs_is_named_and_the_others_show_where_they_wait(rows: Path, tmp_path: Path) -> None:
    words = faults.words(rows, ["method=lora", "strategy=fsdp"], 3, background=True, steps=100_000)
    with started(*words, "train.hang_after=1", f"run_dir={tmp_path}") as run:
        wait_for(lambda: (tmp_path / "metrics.jsonl").is_file() and len(steps(tmp_path)) > 5, run)
        hanging = next(rank["pid"] for rank in events(tmp_path, "start")[0]["ranks"] if rank["rank"] == 1)
        os.kill(hanging, signal.SIGSTOP)
        said = run.communicate(timeout=60)[0]
    assert run.returncode == 76
    assert re.search(rf"dsft: rank 1 hangs in step \d+; the stacks are in {tmp_path / 'logs'}", said)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed"
    assert "rank 1 hangs in step" in status["reason"]
    for rank in (0, 2):
        log = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert "in _steps" in log[log.index(WAITED) :]
