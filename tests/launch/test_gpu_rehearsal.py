"""The checks that a machine with a GPU is asked, on a CPU: they run, and a kill of each costs no other its result."""

import ast
import functools
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import ROOT, main
from benchmarks.gpu.able import look, refusal
from benchmarks.gpu.listed import CHECKS
from benchmarks.gpu.runner import environment


def rehearsed(folder: Path, *words: str) -> dict[str, str]:
    """Name of a check -> its state."""
    code = main(["--cpu", "--out", str(folder), *words])
    lines = [json.loads(line) for line in (folder / "checks.jsonl").read_text().splitlines()]
    assert code == 0, [(line["check"], line["why"]) for line in lines]
    assert (folder / "table.md").read_text().startswith("# The rehearsal of the GPU checks\n\n**No GPU ran")
    return {line["check"]: line["state"] for line in lines}


def test_packed_bases_and_exits_are_rehearsed_beside_a_check_that_hangs(tmp_path: Path) -> None:
    assert rehearsed(tmp_path, "--budget", "500", "--only", "A2,E", "--plant", "A2=hang") == {
        "A2": "passed", "A2 hang": "killed", "E": "passed",
    }  # fmt: skip


def test_a_process_that_sees_no_gpu_refuses_in_one_line(tmp_path: Path) -> None:
    env = environment(tmp_path, ROOT, cpu=False) | {"CUDA_VISIBLE_DEVICES": ""}
    why = refusal(look(env), cpu=False)
    assert why is not None
    assert "\n" not in why


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_check_is_rehearsed_and_killed(tmp_path: Path) -> None:
    states = rehearsed(tmp_path, "--budget", "1500", "--plant", "all=hang+die")
    assert states == {
        f"{name}{fault}": state
        for name in CHECKS for fault, state in (("", "passed"), (" hang", "killed"), (" die", "died"))
    }  # fmt: skip


def torch_names(source: str) -> set[str]:
    """Every name under torch, dotted, that a file writes."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return {name for name in map(ast.unparse, nodes) if re.fullmatch(r"torch(\.\w+)+", name)}


def test_every_name_of_torch_that_only_a_gpu_would_ask_for_is_there() -> None:
    files = sorted((ROOT / "benchmarks" / "gpu").glob("*.py"))
    names = set().union(*(torch_names(path.read_text()) for path in files))
    assert {"torch.cuda._sleep", "torch.cuda.set_sync_debug_mode", "torch.cuda.nccl.version"} <= names
    assert [name for name in sorted(names) if not is_there(name)] == []
    assert not is_there("torch.cuda.set_sync_mode")


def is_there(name: str) -> bool:
    try:
        functools.reduce(getattr, name.split(".")[1:], torch)
    except AttributeError:
        return False
    return True
