"""checkpoint.keep_best: the result of a run is the model of its best evaluation, on one rank and on two."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.faults import events, lines
from tests.launch.processes import checkpoints, dsft

METRIC = "eval/reference_gap"
"""How far the policy has gone from where it began: the first evaluation is the best one."""


def _words(rows: Path, size: int, strategy: str) -> list[str]:
    return [
        "model=tiny", "method=lora", "data=local", f"data.path={rows.with_name('pairs.jsonl')}",
        "data.eval_fraction=0.1", "objective=dpo", "optim.lr=1e-3",
        "train.precision=fp32",
        "train.global_batch_size=4", "train.eval_every=2", "optim.schedule=constant", "tracker=[]",
        "checkpoint.every=5", "checkpoint.keep=1", f"strategy={strategy}", f"launcher.devices={size}",
        "launcher.gpus=none",
    ]  # fmt: skip


@pytest.mark.parametrize(("size", "strategy"), [(1, "single"), (2, "fsdp")])
def test_the_result_is_that_of_the_best_evaluation(size: int, strategy: str, rows: Path, tmp_path: Path) -> None:
    words = _words(rows, size, strategy)
    run_dir, other = tmp_path / "run", tmp_path / "other"
    asked = [*words, f"run_dir={run_dir}", f"checkpoint.keep_best={METRIC}"]
    done = dsft(*asked, "train.steps=11")
    assert done.returncode == 0, done.stderr
    gaps = {line["step"]: line[METRIC] for line in lines(run_dir / "metrics.jsonl") if METRIC in line}
    best = min((gap, step) for step, gap in gaps.items() if step > 0)
    assert best[1] == 2
    status = json.loads((run_dir / "status.json").read_text())
    assert status["best"] == {"step": best[1], "metric": METRIC, "value": best[0]}
    assert checkpoints(run_dir) == [best[1], 11]
    assert f"step {best[1]}  the result is the model of this step" in done.stdout
    assert f"{best[0]:.4f} after" in done.stdout
    assert len(events(run_dir, "verified")) == 1
    short = dsft(*words, f"train.steps={best[1]}", f"run_dir={other}")
    assert short.returncode == 0, short.stderr
    mine, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run_dir, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint.keep_best=eval/accuracy"], "checkpoint.keep_best must be one of eval/loss eval/reward_accuracy"),
        (["train.eval_every=0"], "checkpoint.keep_best needs evaluations to look at, got train.eval_every=0; set it"),
        (["checkpoint.every=0"], "and checkpoint.every=0 saves none; set that, or leave it out"),
        (["data.eval_fraction=0"], "checkpoint.keep_best=eval/loss needs held-out rows that give it"),
    ],
)
def test_a_best_that_nobody_can_tell_is_refused(words: list[str], message: str, rows: Path, tmp_path: Path) -> None:
    asked = [*_words(rows, 1, "single"), "checkpoint.keep_best=eval/loss", f"run_dir={tmp_path / 'run'}"]
    changed = {word.partition("=")[0] for word in words}
    done = dsft(*[word for word in asked if word.partition("=")[0] not in changed], *words, "train.steps=2")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "run").exists()
