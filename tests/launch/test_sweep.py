"""Sweeps on this machine through their real command lines: bad points, several at a time, gone on with afterwards."""

import csv
import os
import signal
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks.faults import events
from dsft.sweeps.ledger import Entry, Ledger
from tests.launch.processes import dsft, started, states, verb, wait_for


def words(rows: Path, sweep: Path, *more: str) -> list[str]:
    return [
        "-m", "model=tiny", "data=local", f"data.path={rows}", "tracker=[none]", "launcher=local",
        "train.precision=fp32", "train.global_batch_size=4", "train.steps=2", "checkpoint.verify_result=false",
        "optim.schedule=constant", f"run_dir={sweep}", *more,
    ]  # fmt: skip


def csv_words(sweep: Path) -> list[str]:
    """Rank and learning rate of each point, as the table's file has them."""
    out = sweep.parent / "table.csv"
    assert verb("table", sweep, "--csv", out).returncode == 0
    with out.open() as file:
        lines = {line["point"]: f"{line.get('method.rank')} {line['optim.lr']}" for line in csv.DictReader(file)}
    return [f"{point}: {words}" for point, words in sorted(lines.items())]


def test_a_point_that_is_refused_and_one_that_fails_leave_the_others_alone(rows: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    done = dsft(*words(rows, sweep, "method.rank=4,0", "launcher.max_parallel=2", "optim.lr=1e-2,1e30"))
    assert done.returncode == 78, done.stdout + done.stderr  # the worst: 1e30 ends in a loss that is not finite
    assert done.stderr.count("dsft: point 2: method.rank must be 1 or more, got 0") == 1
    assert "dsft: point 1: diverged: step 2: loss nan" in done.stderr
    assert states(sweep) == ["done", "DIVERGED", "REFUSED", "REFUSED"]
    assert [line.split()[0] for line in done.stdout.splitlines()[-4:]] == ["0", "1", "2", "3"]
    assert (sweep / "logs" / "0.log").is_file()
    modes = [stat.S_IMODE((sweep / name).stat().st_mode) for name in ("logs", "multirun.yaml")]
    assert modes == [0o700, 0o600], "output of points, and launcher.setup, are for their owner alone"
    assert csv_words(sweep) == ["0: 4 0.01", "1: 4 1e+30", "2: 0 0.01", "3: 0 1e+30"]
    again = verb("resume", sweep, "optim.lr=0.01", "method.rank=4")
    assert again.returncode == 2, again.stdout + again.stderr
    assert "dsft: point 1: run_dir" in again.stderr
    assert "holds another configuration (optim.lr was 1e+30, is 0.01)" in again.stderr
    assert states(sweep) == ["done", "DIVERGED", "done", "done"]  # what it is; the refusal was of this time's words
    assert csv_words(sweep) == ["0: None 0.01", "1: None 1e+30", "2: None 0.01", "3: None 0.01"]  # one rank now
    assert verb("resume", sweep).returncode == 78  # point 1, with its own words again; the others are done
    assert [len(events(sweep / str(index), "start")) for index in range(4)] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    "swept",
    [
        "method.rank=range(1,1)", "method.rank=0,-1", "method=lora,lroa", "data.path=none-1.jsonl,none-2.jsonl",
        "run_dir=a,b", "hydra/launcher=basic",
    ],
)  # fmt: skip
def test_a_sweep_without_a_point_that_can_start_writes_nothing(swept: str, rows: Path, tmp_path: Path) -> None:
    done = dsft(*words(rows, tmp_path / "sweep", swept))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == (2 if "-1" in swept else 1), done.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_request_to_stop_reaches_the_points_and_resume_goes_on(rows: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    long = words(rows, sweep, "train.steps=100000", "train.compile=false", "optim.lr=1e-3,2e-3,3e-3")
    with started(*long, "launcher.max_parallel=2") as run:
        both = [sweep / index / "metrics.jsonl" for index in "01"]
        wait_for(lambda: all(file.is_file() and file.read_text().count("\n") > 1 for file in both), run)
        assert states(sweep) == ["running", "running", "missing"]
        other = verb("resume", sweep)
        assert other.returncode == 2
        assert "is being started by another process" in other.stderr
        run.send_signal(signal.SIGINT)
        assert run.communicate(timeout=120)[0]
    assert run.returncode == 75
    assert states(sweep) == ["stopped", "stopped", "missing"]
    steps = max(events(sweep / index, "stopped")[0]["step"] for index in "01")
    done = verb("resume", sweep, f"train.steps={steps + 1}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [len(events(sweep / index, "resume")) for index in "01"] == [1, 1]
    assert states(sweep) == ["done"] * 3


def test_points_are_a_group_in_wandb_unless_the_user_named_one(rows: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "a sweep"
    typed = words(rows, Path(f"'{sweep}'"), "tracker=[wandb]", "tracker.wandb.mode=offline")
    typed.remove("tracker=[none]")
    done = dsft(*typed, "tracker.wandb.group=null,mine")
    assert done.returncode == 0, done.stdout + done.stderr
    groups = [(sweep / index / "config.yaml").read_text().partition("group: ")[2].split("\n")[0] for index in "01"]
    assert groups == ["a sweep", "mine"]
    assert all(list((sweep / index / "wandb").glob("offline-run-*")) for index in "01")


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    for word in ("status", "resume", "retry", "cancel", "table"):
        done = verb(word, tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "SWEEP must be the run_dir of a run with -m" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert os.environ.get("SLURM_CONF") is None


def test_a_batch_that_is_refused_as_a_whole_is_on_record_with_the_next(rows: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    done = dsft(*words(rows, sweep, "method.rank=0,4", "hydra.sweeper.max_batch_size=1"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert states(sweep) == ["REFUSED", "done"]
    again = verb("resume", sweep)
    assert again.returncode == 2
    assert "dsft: point 0: method.rank must be 1 or more, got 0" in again.stderr
    assert not (sweep / "0").exists()


def test_a_sweep_in_a_folder_that_cannot_be_is_refused_in_one_line(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = dsft(*words(rows, tmp_path / "file" / "sweep", "method.rank=4,8"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"{tmp_path / 'file'} is a file" in done.stderr


def test_a_request_to_stop_ends_a_sweep_that_comes_in_batches(rows: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    long = words(rows, sweep, "train.steps=100000", "train.compile=false", "optim.lr=1e-3,2e-3")
    with started(*long, "hydra.sweeper.max_batch_size=1") as run:
        wait_for(lambda: (sweep / "0" / "metrics.jsonl").is_file(), run)
        run.send_signal(signal.SIGTERM)
        assert run.communicate(timeout=120)[0]
    assert run.returncode == 75
    assert states(sweep) == ["stopped"]


def test_resume_is_refused_where_the_folder_of_typing_is_gone(tmp_path: Path) -> None:
    book = Ledger("loss", str(tmp_path / "gone"), None)
    book.put(0, Entry(["model=tiny"], None), keep=False)
    book.write(tmp_path)
    done = verb("resume", tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "the folder in which the sweep was typed must be there" in done.stderr


def test_ctrl_c_while_points_are_checked_is_said_and_is_no_success(tmp_path: Path) -> None:
    book = Ledger("loss", str(tmp_path), None)
    for index in range(100):
        book.put(index, Entry(["model=tiny", "launcher=local", "method.rank=0"], None), keep=False)
    book.write(tmp_path)
    command = [sys.executable, "-m", "dsft.sweep", "resume", str(tmp_path)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as run:
        assert run.stderr is not None
        assert run.stderr.readline().startswith("dsft: point 0: method.rank must be")
        run.send_signal(signal.SIGINT)
        assert run.stderr.read().splitlines()[-1].startswith("dsft: stopped before it was through")
    assert run.returncode == 75
