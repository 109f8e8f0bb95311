"""A machine with GPUs that torch cannot use, through the real command line: refused, and a run on its CPU if asked."""

import json
from pathlib import Path

import pytest

from dsft import plan
from dsft.comm.sight import without_cuda
from tests.launch.refusals import good, is_refused, start

pytestmark = pytest.mark.skipif(not without_cuda(), reason="this torch is a build for CUDA")


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a stand-in for NVIDIA's program notes that it was called; two GPUs are visible."""
    note, program = tmp_path / "asked", tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho called >> '{note}'\necho 81559\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    return note


def words(folder: Path, *more: str) -> list[str]:
    return [
        "model=tiny", "launcher=local", "tracker=[]", "train.steps=1", "checkpoint.every=0",
        "checkpoint.verify_result=false", f"run_dir={folder / 'run'}", *good(folder), *more,
    ]  # fmt: skip


def test_a_shell_of_a_job_with_gpus_on_a_machine_without_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert plan.main(["model=tiny", "launcher=local"]) == 2
    assert capsys.readouterr().err.startswith("dsft: the 4 GPUs of the SLURM job must be usable by torch")
    assert plan.main(["model=tiny", "launcher=local", "launcher.gpus=none"]) == 0


def test_a_run_is_refused_and_not_made_on_the_cpu(tmp_path: Path, asked: Path) -> None:
    is_refused(start(*words(tmp_path)), "the 2 GPUs of CUDA_VISIBLE_DEVICES=0,1 must be usable by torch")
    assert not (tmp_path / "run").exists()
    assert not asked.exists()


def test_who_asks_for_the_cpu_gets_it(tmp_path: Path, asked: Path) -> None:
    done = start(*words(tmp_path, "launcher.gpus=none"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    assert not asked.exists()
