"""Runs as real SLURM jobs on four nodes: the same numbers, resumed after what SLURM does, refused early."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from benchmarks.faults import events, lines
from benchmarks.testbed import Testbed
from tests.launch.processes import dsft, steps

BOUND = 1e-5
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("cluster")


def words(rows: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "model=tiny", "data=local", f"data.path={rows}", "tracker=[]", "train.precision=fp32", "train.steps=6",
        "train.global_batch_size=8", "checkpoint.every=2", "checkpoint.verify_result=false", "optim.lr=1e-3",
        "optim.schedule=constant", f"run_dir={run_dir}", *more,
    ]  # fmt: skip


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir / "metrics.jsonl") if "loss" in line]


def status(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return found


def job_of(run_dir: Path) -> str:
    return str(json.loads((run_dir / "slurm" / "job.json").read_text())["job"])


def state(job_id: str, field: str = "JobState") -> str:
    shown = subprocess.run(["scontrol", "-o", "show", "job", job_id], capture_output=True, text=True, check=True).stdout
    return next(word for word in shown.split() if word.startswith(f"{field}=")).partition("=")[2]


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come to pass")


@pytest.fixture(scope="module")
def alone(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    done = dsft(*words(rows, run_dir, "launcher=local", "method=qlora"))
    assert done.returncode == 0, done.stderr
    return losses(run_dir)


@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_two_nodes_compute_what_one_process_does(strategy: str, rows: Path, alone: list[float], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = ("launcher=slurm", "launcher.nodes=2", "launcher.devices=2", "method=qlora", f"strategy={strategy}")
    done = dsft(*words(rows, run_dir, *more))
    log = run_dir / "slurm" / f"{job_of(run_dir)}.log"
    assert done.returncode == 0, done.stderr + log.read_text()
    assert len(alone) == 6
    assert losses(run_dir) == pytest.approx(alone, rel=BOUND)
    start = events(run_dir, "start")[0]
    assert [rank["host"] for rank in start["ranks"]] == ["n1", "n1", "n2", "n2"]
    assert {host: sorted(each) for host, each in start["all_reduce"]["nodes"].items()} == {
        "n1": ["across_s", "inside_s"],
        "n2": ["across_s", "inside_s"],
    }
    assert state(job_of(run_dir)) == "COMPLETED"


def test_a_job_that_slurm_puts_back_goes_on_to_the_same_adapter_in_the_same_wandb_run(
    rows: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ("launcher=slurm", "launcher.nodes=2", "launcher.devices=1", "strategy=ddp", "train.steps=60")
    assert dsft(*words(rows, whole, *more)).returncode == 0
    wandb = ("tracker=[wandb]", "tracker.wandb.mode=offline", "launcher.wait=false")
    assert dsft(*words(rows, cut, *more, *wandb)).returncode == 0
    until(lambda: (cut / "metrics.jsonl").is_file() and len(losses(cut)) >= 3)
    wandb_id = status(cut)["wandb_id"]
    subprocess.run(["scontrol", "requeue", job_of(cut)], check=True)
    until(lambda: status(cut)["state"] == "queued")
    until(lambda: status(cut)["state"] == "done" and state(job_of(cut)) == "COMPLETED")
    assert status(cut)["attempts"] == 2
    assert losses(cut) == losses(whole)
    assert steps(cut) == list(range(1, 61))
    assert status(cut)["wandb_id"] == wandb_id
    assert [path.name.rpartition("-")[2] for path in (cut / "wandb").glob("offline-run-*")] == [wandb_id] * 2
    mine, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (cut, whole))
    assert all((mine[name] == theirs[name]).all() for name in theirs)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("launcher.partition=gpus", "launcher.partition must be one of low, high, got gpus"),
        ("launcher.nodes=5", "launcher.nodes must be at most 4, the nodes of partition low, got 5"),
        ("launcher.time=2", "launcher.time must leave 30 s beside launcher.notice_s=120"),
        ("launcher.time=soon", "launcher.time must be SLURM's: a time limit reads like 90, 1:30:00 or 2-12:30:00"),
        ("run_dir=/dev/shm/dsft-test-run", "run_dir must lie where every node sees it"),
        ("launcher.constraint=quantum", "SLURM refused the job: Batch job submission failed: Invalid feature"),
        (
            "launcher.memory=900G",
            "SLURM could never start this job: it has no such nodes; asked for launcher.memory",
        ),
        ("launcher.cpus=64", "SLURM could never start this job: it has no such nodes; asked for launcher.cpus=64"),
        ('launcher.exclude="n[1-4]"', "SLURM could never start this job: it has no such nodes"),
        ("+launcher.extra.output=/tmp/x", "launcher.extra must be without output, which dsft sets itself"),
        ("+launcher.extra.bogus=1", "SLURM refused the job: unrecognized option '--bogus=1'"),
    ],
)
def test_what_the_cluster_has_not_is_refused(word: str, said: str, rows: Path, tmp_path: Path) -> None:
    done = dsft(*words(rows, tmp_path / "run", "launcher=slurm", word))
    assert done.returncode == 2
    assert done.stderr.startswith(f"dsft: {said}")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_second_start_in_the_folder_of_a_job_is_refused(rows: Path, tmp_path: Path) -> None:
    typed = words(rows, tmp_path / "run", "launcher=slurm", "launcher.wait=false", "+launcher.extra.begin=now+1hour")
    assert dsft(*typed).returncode == 0
    assert status(tmp_path / "run")["state"] == "queued"
    done = dsft(*typed)
    subprocess.run(["scancel", job_of(tmp_path / "run")], check=True)
    assert done.returncode == 2
    assert "which is PENDING; wait for it" in done.stderr


def test_a_dry_run_prints_the_script_without_slurm(rows: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    more = ["launcher.dry_run=true", "launcher.nodes=2", "launcher.time=1-00:00:00", "strategy=ddp",
            "launcher.setup=[module load cuda]", "+launcher.extra.nice=100"]  # fmt: skip
    command = [sys.executable, "-m", "dsft.run", *words(rows, run_dir, *more)]
    (tmp_path / "bin").mkdir()
    for name in ("git", "stat"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    env = {**os.environ, "PATH": str(tmp_path / "bin")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    script = done.stdout[done.stdout.index("#!/bin/bash") :].splitlines()
    for line in ("#SBATCH --nodes=2", "#SBATCH --time=1-00:00:00", "#SBATCH --nice=100", "#SBATCH --signal=USR2@120"):
        assert line in script
    assert script.index("module load cuda") < next(n for n, line in enumerate(script) if "PYTHONPATH" in line)
    assert f"#SBATCH --output='{run_dir}/slurm/%j.log'" in script
    assert not run_dir.exists()


@pytest.mark.parametrize("way", ["changed", "added"])
def test_a_job_whose_code_was_changed_since_ends_and_names_the_file(way: str, rows: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    held = ("launcher=slurm", "launcher.wait=false", "+launcher.extra.begin=now+1hour", "train.steps=2")
    assert dsft(*words(rows, run_dir, *held)).returncode == 0
    job = json.loads((run_dir / "slurm" / "job.json").read_text())
    code = run_dir / "code" / job["code"]
    record = code / "dsft" / "recorder.py"
    assert (code.stat().st_mode & 0o777, record.stat().st_mode & 0o777) == (0o500, 0o400)
    text = record.read_text()
    assert text == (ROOT / "dsft" / "recorder.py").read_text()
    file = record if way == "changed" else code / "extra.py"
    file.write_text(f"{text}\n")
    subprocess.run(["scontrol", "update", f"JobId={job['job']}", "StartTime=now"], check=True)
    until(lambda: status(run_dir)["state"] == "failed")
    assert status(run_dir)["reason"].startswith(f"{file} is not what was submitted")
    until(lambda: state(job["job"], "ExitCode") == "76:0")
    log = (run_dir / "slurm" / f"{job['job']}.log").read_text()
    assert log.count(str(file)) == 1
    assert "srun ended" not in log
    assert not (run_dir / "logs").exists()


def test_a_job_takes_what_was_staged_in_another(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))
    typed = words(rows, tmp_path / "run", "launcher=slurm", "launcher.nodes=2", "launcher.devices=1", "train.steps=2")
    staged = subprocess.run(
        ["srun", sys.executable, "-m", "dsft.stage", *typed], capture_output=True, text=True, check=False
    )
    assert staged.returncode == 0, staged.stderr
    assert "tokens       new: " in staged.stdout
    there = _held(tmp_path / "cache")
    done = dsft(*typed)
    assert done.returncode == 0, done.stderr
    assert _held(tmp_path / "cache") == there


def _held(cache: Path) -> dict[Path, int]:
    """What lies there and when it was written, but for digests: of a file written a moment before none is noted."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if "digests" not in path.parts}


@pytest.mark.parametrize("which", [0, 1])
def test_an_elastic_job_outlives_a_node(which: int, cluster: Testbed, rows: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = ("launcher=slurm", "launcher.wait=false", "launcher.nodes=2", "launcher.devices=1", "launcher.elastic=true",
            "strategy=ddp", "train.steps=100000", "train.compile=false")  # fmt: skip
    assert dsft(*words(rows, run_dir, *more)).returncode == 0
    job_id = job_of(run_dir)
    until(lambda: (run_dir / "metrics.jsonl").is_file() and len(losses(run_dir)) >= 3)
    first = [rank["host"] for rank in events(run_dir, "start")[0]["ranks"]]
    lost, kept = first[which], first[1 - which]
    cluster("kill-node", lost)
    until(lambda: len(events(run_dir, "resume")) == 1)
    hosts = [rank["host"] for rank in events(run_dir, "start")[-1]["ranks"]]
    restarts = state(job_id, "Restarts")
    subprocess.run(["scancel", job_id], check=True)
    cluster("start-node", lost)
    if which == 1:
        assert (hosts, restarts) == ([kept], "0")  # at once, inside the allocation
    else:
        assert (len(hosts), lost in hosts, restarts) == (2, False, "1")  # the batch step was lost, which the guard saw


@pytest.mark.parametrize("how", ["notice", "preempted", "kill", "hang", "cancel"])
def test_what_ends_the_ranks_and_what_follows(how: str, rows: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = ("launcher=slurm", "launcher.wait=false", "launcher.devices=2", "strategy=ddp", "train.steps=100000",
            "train.compile=false")  # fmt: skip
    assert dsft(*words(rows, run_dir, *more)).returncode == 0
    job_id = job_of(run_dir)
    until(lambda: (run_dir / "metrics.jsonl").is_file() and len(losses(run_dir)) >= 3)
    rank = next(rank for rank in events(run_dir, "start")[0]["ranks"] if rank["rank"] == 1)
    if how in ("notice", "preempted"):
        asked = {
            "notice": ["scancel", "--signal=USR2", job_id],  # as SLURM gives it: to the tasks of all steps
            "preempted": ["sbatch", "-phigh", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"],
        }  # fmt: skip
        subprocess.run(asked[how], check=True)
        until(lambda: state(job_id, "Restarts") == "1" and len(events(run_dir, "resume")) == 1)
        assert events(run_dir, "resume")[0]["step"] == events(run_dir, "stopped")[0]["step"]
    elif how in ("kill", "hang"):
        number = {"kill": "-KILL", "hang": "-STOP"}[how]
        kill = ["srun", "--overlap", f"--jobid={job_id}", "--ntasks=1", "--nodes=1", "kill", number, str(rank["pid"])]
        subprocess.run(kill, check=True)
        until(lambda: len(events(run_dir, "resume")) == 1)
        said = (run_dir / "slurm" / f"{job_id}.log").read_text()
        assert {"kill": "rank 1 was killed by SIGKILL", "hang": "rank 1 hangs in step "}[how] in said
        assert state(job_id, "Restarts") == "0"
        assert not json.loads((run_dir / "supervisor.json").read_text())["crashes"]
    subprocess.run(["scancel", job_id], check=True)
    until(lambda: state(job_id) == "CANCELLED")
    if how == "cancel":
        until(lambda: status(run_dir)["state"] == "stopped")
        assert events(run_dir, "stopped")[0]["step"] == len(losses(run_dir))
