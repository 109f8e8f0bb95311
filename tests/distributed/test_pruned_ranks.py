"""Diff pruning's choice is one process's on two ranks, and a run that is killed on the way ends with the same bits."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import faults

STEPS = 24
RUN = ["method=diff_pruning", "method.penalty=1e-4", "method.gate_start=2", "optim.schedule=constant"]


def _places(run_dir: Path) -> set[tuple[str, int]]:
    stored = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    return {(name, int(i)) for name, value in stored.items() if name.endswith(".indices") for i in value}


@pytest.fixture(scope="module")
def alone(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    _finish([*faults.words(rows, RUN, 1, background=True, steps=STEPS), "strategy=single"], run_dir)
    return run_dir


@pytest.mark.parametrize(
    "strategy", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "zero2", "ddp"))]
)
def test_two_ranks_keep_what_one_keeps_and_survive_a_kill_to_the_bit(
    strategy: str, rows: Path, alone: Path, tmp_path: Path
) -> None:
    command = [*faults.words(rows, RUN, 2, background=True, steps=STEPS), f"strategy={strategy}"]
    _finish(command, tmp_path / "reference")
    (told,) = faults.events(tmp_path / "reference", "pruned")
    (told_alone,) = faults.events(alone, "pruned")
    assert [told[key] for key in ("step", "kept", "of")] == [told_alone[key] for key in ("step", "kept", "of")]
    assert told["step"] == STEPS // 2
    ours, theirs = _places(tmp_path / "reference"), _places(alone)
    assert len(ours) == len(theirs) == told["kept"] == int(0.005 * told["of"])
    assert len(ours & theirs) >= 0.995 * len(theirs), "other orders of sums move only what is nearly equal"
    verdict = faults.survive(tmp_path / "reference", tmp_path / "run", command, 2, 1, random.Random(strategy))
    assert len(verdict.kills) == len(verdict.resumed_from) == 1
    assert not verdict.different
    state = faults.saved_state(tmp_path / "run")
    assert torch.equal(state["method/pruned"], torch.ones(1, dtype=torch.uint8))
    gates = [value for name, value in state.items() if name.startswith("param/") and name.endswith("_gate")]
    assert sum(int((value > 0).sum()) for value in gates) == told["kept"]


def _finish(command: list[str], run_dir: Path) -> None:
    words = [sys.executable, "-m", "dsft.run", *command, f"run_dir={run_dir}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
