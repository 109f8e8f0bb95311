"""dsft export through its real command line, for adapters in our own format; bf16, as most runs are."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import warm
from tests.launch.processes import dsft

SMALL = [
    "model=tiny", "data=reasoning_gym", "data.size=64", "data.eval_size=0", "train.steps=2", "train.precision=bf16",
    "train.global_batch_size=4", "tracker=[none]", "launcher=local", "checkpoint=none", "optim.lr=1e-2",
]  # fmt: skip


def _export(run_dir: Path, to: str, out: Path) -> "subprocess.CompletedProcess[str]":
    return warm.run("dsft.export", run_dir, "--to", to, out)


def _ran(run_dir: Path, *words: str) -> None:
    done = dsft(*SMALL, *words, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "adapter" / "verified.json").read_text())["same"] is True


def _modes(folder: Path) -> set[int]:
    return {path.stat().st_mode for path in folder.iterdir() if path.is_file()}


def test_an_adapter_that_cannot_be_merged_is_refused_in_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    _ran(run_dir, "method=houlsby", "launcher.devices=2", "strategy=fsdp")
    refused = _export(run_dir, "merged", out)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "no weight of the base can hold what Houlsby adds, got merged; take --to adapter" in refused.stderr
    assert not out.exists()
    (tmp_path / "file").touch()
    for place, why in ((tmp_path / "file" / "y", "Not a directory"), (Path("/proc/x"), "No such file or directory")):
        refused = _export(run_dir, "adapter", place)
        assert refused.returncode == 2, refused.stderr
        assert refused.stderr.startswith(f"dsft: OUT must be where a folder can be made, got {place}, ")
        assert why in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert _export(run_dir, "adapter", out).returncode == 0
    assert (out / "dsft_adapter.json").is_file()
    assert _modes(out) == _modes(tmp_path)


@pytest.mark.parametrize("words", [("method=bitfit", "launcher.devices=2", "strategy=zero3")], ids=" ".join)
def test_a_bitfit_run_merges_into_a_plain_folder(words: tuple[str, ...], tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    _ran(run_dir, *words)
    done = _export(run_dir, "merged", out)
    assert done.returncode == 0, done.stderr
    (tmp_path / "file").touch()
    assert _modes(out) == _modes(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype is torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.bias.abs().max() > 1e-3
