"""AdaLoRA's allocation is one process's on any ranks, and a run that is killed on the way ends with the same bits."""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults

STEPS = 24
RUN = ["method=adalora", "method.interval=3", "method.alpha=512", "method.final=0.4", "optim.schedule=constant"]
LAYERS, TARGET = 21, 8 * 21


@pytest.fixture(scope="module")
def alone(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process told of its allocations."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    _finish([*faults.words(rows, RUN, 1, background=True, steps=STEPS), "strategy=single"], run_dir)
    return faults.events(run_dir, "ranks")


@pytest.mark.parametrize(
    "strategy", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "zero2"))]
)
def test_two_ranks_allocate_as_one_and_survive_a_kill_to_the_bit(
    strategy: str, rows: Path, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    command = [*faults.words(rows, RUN, 2, background=True, steps=STEPS), f"strategy={strategy}"]
    _finish(command, tmp_path / "reference")
    told = faults.events(tmp_path / "reference", "ranks")
    assert [_what(line) for line in told] == [_what(line) for line in alone]
    assert told[-1]["budget"] == TARGET
    assert len(told[-1]["ranks"]) == LAYERS
    assert len(set(told[-1]["ranks"].values())) > 2, "layers compete"
    verdict = faults.survive(tmp_path / "reference", tmp_path / "run", command, 2, 1, random.Random(strategy))
    assert len(verdict.kills) == len(verdict.resumed_from) == 1
    assert not verdict.different
    state = faults.saved_state(tmp_path / "run")
    assert int(state["method/kept"].sum()) == TARGET
    lambdas = [value for name, value in state.items() if name.startswith("param/") and ".lora_E." in name]
    assert sum(int((value != 0).sum()) for value in lambdas) == TARGET


def _what(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["step"], line["budget"], line["ranks"]


def _finish(command: list[str], run_dir: Path) -> None:
    words = [sys.executable, "-m", "dsft.run", *command, f"run_dir={run_dir}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
