"""The main job through its real command line: a run folder as documented, ranks that die, sweeps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import warm

SMALL = [
    "model=tiny", "method=lora", "data=reasoning_gym", "data.size=64", "data.eval_size=4", "train.precision=fp32",
    "train.global_batch_size=4", "tracker=[none]", "launcher=local", "optim.lr=1e-3",
    "checkpoint.verify_result=false",
]  # fmt: skip


def dsft(*words: str, verb: str = "run") -> subprocess.CompletedProcess[str]:
    return warm.run(f"dsft.{verb}", *words)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_folder_is_as_documented(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*SMALL, "train.steps=3", "train.log_samples=true", "launcher.devices=2", f"run_dir={run_dir}"]
    done = dsft(*words, "checkpoint.verify_result=true")
    assert done.returncode == 0, done.stderr
    metrics = lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3]
    assert [line["step"] for line in metrics if "eval/loss" in line] == [0, 3]
    assert {"grad_norm", "lr", "tokens", "supervised_tokens", "tokens_per_s", "step_s", "peak_memory_bytes"} <= set(
        next(line for line in metrics if "loss" in line)
    )
    samples = lines(run_dir / "samples.jsonl")
    assert [len(line["ids"]) for line in samples] == [4, 4, 4]  # type: ignore[arg-type]
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["attempts"]) == ("done", 3, 1)
    kinds = [line["event"] for line in lines(run_dir / "events.jsonl")]
    assert kinds == ["start", "assembled", "save", "save", "base_digest", "verified", "done"]
    assert status["checkpoint"] == "step-00000003"
    assert (run_dir / "checkpoints" / "step-00000003" / "manifest.json").is_file()
    assert json.loads((run_dir / "adapter" / "verified.json").read_text())["same"] is True
    start: dict[str, Any] = lines(run_dir / "events.jsonl")[0]
    assert [sorted(rank) for rank in start["ranks"]] == 2 * [["clock_s", "device", "host", "pid", "rank"]]
    assert start["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert len(start["versions"]["code"]) == 64
    assert set(start["all_reduce"]) == {"mib", "seconds", "gb_per_s"}
    assert json.loads((run_dir / "plan.json").read_text())["parameters"]["trainable"] == 89088
    assert json.loads((run_dir / "provenance.json").read_text())["data_digest"]
    assert (run_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert (run_dir / "logs" / "rank-1.log").is_file()
    again = dsft(*words)
    assert again.returncode == 0
    assert "done already" in again.stdout


def test_one_process_may_have_the_strategies_of_many(tmp_path: Path) -> None:
    losses = {}
    for strategy in ("single", "ddp", "fsdp"):
        run_dir = tmp_path / strategy
        done = dsft(*SMALL, "train.steps=2", "launcher.devices=1", f"strategy={strategy}", f"run_dir={run_dir}")
        assert done.returncode == 0, done.stderr
        losses[strategy] = [line["loss"] for line in lines(run_dir / "metrics.jsonl") if "loss" in line]
    assert all(each == pytest.approx(losses["single"], rel=1e-5) for each in losses.values())


def test_a_killed_rank_ends_the_run_with_76_and_is_named(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*SMALL, "train.steps=100000", "train.compile=false", "launcher.devices=2", f"run_dir={run_dir}"]
    run = subprocess.Popen(
        [sys.executable, "-m", "dsft.run", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        ranks = _ranks_at_work(run, run_dir)
        os.kill(ranks[1], signal.SIGKILL)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 76, errors
    assert "rank 1" in errors
    assert not any(_alive(pid) for pid in ranks)
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"


def test_ctrl_c_stops_the_run_with_75_and_leaves_no_process(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [*SMALL, "train.steps=100000", "train.compile=false", "launcher.devices=2", f"run_dir={run_dir}"]
    run = subprocess.Popen(
        [sys.executable, "-m", "dsft.run", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        ranks = _ranks_at_work(run, run_dir)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 75, errors
    assert not any(_alive(pid) for pid in ranks)
    assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"


def _ranks_at_work(run: "subprocess.Popen[str]", run_dir: Path) -> list[int]:
    """Process ids of the ranks, once the first steps are done."""
    until = time.monotonic() + 240
    while time.monotonic() < until and run.poll() is None:
        metrics = run_dir / "metrics.jsonl"
        if metrics.is_file() and sum('"loss"' in line for line in metrics.read_text().splitlines()) >= 2:
            start = lines(run_dir / "events.jsonl")[0]
            return [rank["pid"] for rank in start["ranks"]]  # type: ignore[attr-defined]
        time.sleep(0.2)
    raise AssertionError(f"no step was done; exit code {run.poll()}")


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_sweep_runs_each_point_in_its_own_folder(tmp_path: Path) -> None:
    done = dsft("-m", *SMALL, "train.steps=1", "data.eval_size=0", "method.rank=4,8", f"run_dir={tmp_path / 'sweep'}")
    assert done.returncode == 0, done.stderr
    for index, rank in ((0, 4), (1, 8)):
        point = tmp_path / "sweep" / str(index)
        assert json.loads((point / "status.json").read_text())["state"] == "done"
        assert json.loads((point / "adapter" / "adapter_config.json").read_text())["r"] == rank
    assert sorted(line.split()[4] for line in done.stdout.splitlines()[-3:]) == ["4", "8", "method.rank"]
    shutil.rmtree(tmp_path / "sweep" / "1" / "checkpoints")
    longer = dsft("-m", *SMALL, "train.steps=2", "data.eval_size=0", "method.rank=4,8", f"run_dir={tmp_path / 'sweep'}")
    assert longer.returncode == 2  # the worst point's
    assert "has trained 1 steps and holds no checkpoint to go on from" in longer.stderr
    assert [json.loads((tmp_path / "sweep" / i / "status.json").read_text())["step"] for i in "01"] == [2, 1]


def test_composing_the_main_job_takes_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from dsft.run import main; "
        "code = main(['--cfg', 'job', 'method=qlora', 'model=llama70b', 'strategy=zero3']); "
        "sys.exit(code or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "quantizers.nf4" in done.stdout


def test_joins_processes_that_torchrun_started_and_writes_fp32_from_shards_left_gathered(tmp_path: Path) -> None:
    words = [*SMALL, "launcher=auto", "train.steps=1", "data.eval_size=2", f"run_dir={tmp_path / 'run'}"]
    words += ["strategy=fsdp", "strategy.reshard=false", "train.precision=bf16", "checkpoint.verify_result=true"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dsft.run",
         *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "torchrun" in done.stdout
    assert len(lines(tmp_path / "run" / "events.jsonl")[0]["ranks"]) == 2  # type: ignore[arg-type]
    learned = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in learned.values()} == {torch.float32}
    assert any(bool((tensor != tensor.bfloat16().float()).any()) for tensor in learned.values())
    assert json.loads((tmp_path / "run" / "adapter" / "verified.json").read_text())["same"] is True
