"""Every mistake of a user's, through the real command line: exit 2, one line, nothing written, in seconds."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.launch.refusals import ROWS, good, is_refused, jsonl, start

Prepare = Callable[[Path], list[str]]


def _truncated_file(folder: Path) -> list[str]:
    good = [json.dumps(row) for row in ROWS]
    return ["data=local", jsonl(folder, *good[:3], good[3][:20])]


def _row_without_field(folder: Path) -> list[str]:
    good = [json.dumps(row) for row in ROWS]
    return ["data=local", jsonl(folder, *good[:2], json.dumps({"question": "and?"}))]


def _no_supervision(folder: Path) -> list[str]:
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "user", "content": "anyone?"}]}
    return ["data=local", jsonl(folder, *[json.dumps(row)] * 4)]


def _model_without_config(folder: Path) -> list[str]:
    (folder / "model").mkdir()
    return [*good(folder), "model=custom", f"model.path={folder / 'model'}"]


def _truncated_weights(folder: Path) -> list[str]:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": torch.zeros(1000)}, model / "model.safetensors")
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:-400])
    return [*good(folder), "model=custom", f"model.path={model}"]


def _other_configuration(folder: Path) -> list[str]:
    run_dir = folder / "run"
    run_dir.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "dsft.run", "--cfg", "job", "--resolve", "model=tiny", "method=lora",
         "train.steps=2", "launcher=local", "tracker=[none]", f"run_dir={run_dir}", "strategy=single", *good(folder)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (run_dir / "config.yaml").write_text(done.stdout.replace("rank: 16", "rank: 4"))
    return good(folder)


def _read_only_folder(folder: Path) -> list[str]:
    return [*good(folder), "run_dir=/proc/dsft-run"]


def _below_anothers_home(folder: Path) -> list[str]:
    (folder / "home").mkdir(mode=0o600)
    return [*good(folder), f"run_dir={folder}/home/run"]


def _unreadable_folder(folder: Path) -> list[str]:
    (folder / "run").mkdir(mode=0o300)
    return good(folder)


def _link_to_a_folder_that_was_removed(folder: Path) -> list[str]:
    (folder / "run").symlink_to(folder / "removed")
    return good(folder)


def _too_long_a_name(folder: Path) -> list[str]:
    return [*good(folder), f"run_dir={folder}/{'n' * 300}"]


def _too_long_a_path(folder: Path) -> list[str]:
    return [*good(folder), f"run_dir={folder}{'/name' * 880}"]


CASES: dict[str, tuple[Prepare, str]] = {
    "misspelt option": (lambda folder: [*good(folder), "method=qlra"], "did you mean qlora"),
    "misspelt key": (lambda folder: [*good(folder), "method.rnk=4"], "did you mean method.rank"),
    "misspelt value": (lambda folder: [*good(folder), "train.precision=bf61"], "train.precision must be"),
    "rank 0": (lambda folder: [*good(folder), "method.rank=0"], "method.rank must be 1 or more, got 0"),
    "negative rank": (lambda folder: [*good(folder), "method.rank=-8"], "method.rank must be 1 or more, got -8"),
    "prefix of no tokens": (
        lambda folder: [*good(folder), "method=prefix", "method.num_virtual_tokens=0"],
        "method.num_virtual_tokens must be 1 or more, got 0",
    ),
    "prefix beyond the model's reach": (
        lambda folder: [*good(folder), "method=prefix", "method.num_virtual_tokens=2040"],
        "the positions that the model knows less 2040 that the method takes",
    ),
    "prompt longer than the model's reach": (
        lambda folder: [*good(folder), "method=prompt", "method.num_virtual_tokens=2048"],
        "method.num_virtual_tokens must be below 2048, the positions of the model, got 2048",
    ),
    "prompt from no text": (
        lambda folder: [*good(folder), "method=prompt", "method.init_text=''"],
        "method.init_text must hold a text, got ''",
    ),
    "batch below ranks": (
        lambda folder: [*good(folder), "train.global_batch_size=1", "launcher.devices=2"],
        "train.global_batch_size must be at least the number of data ranks, 2",
    ),
    "missing file": (lambda folder: ["data=local", f"data.path={folder}/none.jsonl"], "none.jsonl"),
    "empty file": (lambda folder: ["data=local", jsonl(folder)], "rows.jsonl"),
    "truncated file": (_truncated_file, "rows.jsonl:4"),
    "row without the field": (_row_without_field, "rows.jsonl:3"),
    "nothing supervised": (_no_supervision, "supervise"),
    "max_length below every prompt": (
        lambda folder: [*good(folder), "train.max_length=4"],
        "train.max_length must be at least",
    ),
    "another configuration": (_other_configuration, "method.rank was 4, is 16"),
    "too many devices": (
        lambda folder: [*good(folder), "launcher.devices=999", "train.global_batch_size=2000"],
        "launcher.devices must be at most",
    ),
    "model without config": (_model_without_config, "config.json"),
    "truncated safetensors": (_truncated_weights, "model.safetensors"),
    "read-only run folder": (_read_only_folder, "run_dir must be writable"),
    "below another's home": (_below_anothers_home, "/home/run: Permission denied"),
    "unreadable run folder": (_unreadable_folder, "/run: Permission denied"),
    "run folder that was removed behind its link": (_link_to_a_folder_that_was_removed, "is a link to nowhere"),
    "run folder of 300 characters": (_too_long_a_name, "File name too long"),
    "path of 4,400 characters": (_too_long_a_path, "File name too long"),
    "adapter on a tied head": (
        lambda folder: [*good(folder), "model=smollm2_135m", "method.target_modules=lm_head"],
        "must not name lm_head",
    ),
    "whole model on a packed base": (
        lambda folder: [*good(folder), "method=full", "quantization=int8"],
        "method=full trains the base's own weights",
    ),
    "warm-up without end": (
        lambda folder: [*good(folder), "optim.warmup_steps=5"],
        "optim.warmup_steps must be below train.steps, 2, got 5",
    ),
    "misspelt key to allow": (
        lambda folder: [*good(folder), "resume.allow=[method.rnk]"],
        "resume.allow must hold keys of the configuration, got method.rnk; did you mean method.rank?",
    ),
    "optimizer that needs whole tensors": (
        lambda folder: [*good(folder), "optim.name=paged_adamw8bit", "strategy=zero2", "launcher.devices=2"],
        "take optim.name=adamw",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    prepare, expected = CASES[name]
    run_dir = tmp_path / "run"
    words = ["model=tiny", "method=lora", "train.steps=2", "launcher=local", "tracker=[none]", f"run_dir={run_dir}"]
    words += prepare(tmp_path)
    before = sorted(path.name for path in run_dir.iterdir()) if run_dir.exists() else None
    started = time.monotonic()
    done = start(*words)
    seconds = time.monotonic() - started
    is_refused(done, expected)
    assert (sorted(path.name for path in run_dir.iterdir()) if run_dir.exists() else None) == before
    print(f"{name}: {seconds:.1f} s: {done.stderr.strip()}")


def test_an_absent_optional_package_is_named_with_its_install_command(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.machinery\n\nfind = importlib.machinery.PathFinder.find_spec\n\n\n"
        "def without(name, path=None, target=None):\n"
        "    return None if name.split('.')[0] == 'tensorboard' else find(name, path, target)\n\n\n"
        "importlib.machinery.PathFinder.find_spec = staticmethod(without)\n"
    )
    words = ["model=tiny", "tracker=[tensorboard]", "launcher=local", f"run_dir={tmp_path / 'run'}", *good(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "dsft.run", *words],
        env={**os.environ, "PYTHONPATH": str(hidden)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "pip install 'dsft[tensorboard]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
