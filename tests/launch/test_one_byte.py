"""One changed byte of a base of 100 MiB: seen before anything goes on from it, or is given away with it."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsft.compose import compose
from tests import warm

POSITIONS = 204_800
"""Of a GPT-2 of width 128: 100 MiB of fp32, which a LoRA on its head leaves as they are."""
RUN = ("method=lora", "method.target_modules=[lm_head]", "data=reasoning_gym", "data.size=64", "data.eval_size=0",
       "train.eval_every=0", "launcher=local", "tracker=[]", "train.steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The base, in a cache that does not know it."""
    before, place = os.environ["DSFT_CACHE"], tmp_path_factory.mktemp("base")
    os.environ["DSFT_CACHE"] = str(place / "cache")
    words = ["model=tiny", "model.config.model_type=gpt2", f"model.config.max_position_embeddings={POSITIONS}"]
    made = compose([*words, "method=lora", "data=reasoning_gym"]).run.model.resolve()
    assert made.folder is not None
    shutil.copytree(made.folder, place / "model")
    assert (place / "model" / "model.safetensors").stat().st_size > 100 * 2**20
    yield place / "model"
    os.environ["DSFT_CACHE"] = before


@pytest.fixture(scope="module")
def run_dir(base: Path) -> Path:
    """A run of two ranks on it."""
    run_dir = base.parent / "run"
    done = _start(base, f"run_dir={run_dir}", "launcher.devices=2")
    assert done.returncode == 0, done.stderr
    return run_dir


def _start(base: Path, *words: str) -> Any:
    return warm.run("dsft.run", *RUN, "model=tiny", f"model.path={base}", *words)


def _flip(file: Path, at: int = 50 * 2**20 + 3) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def test_a_run_and_its_checkpoints_hold_the_digest_that_was_read_beside_its_steps(base: Path, run_dir: Path) -> None:
    known = json.loads((run_dir / "provenance.json").read_text())
    assert known["base_digest"] != known["base_fingerprint"]
    manifests = sorted((run_dir / "checkpoints").glob("*/manifest.json"))
    saved = [json.loads(manifest.read_text())["identity"] for manifest in manifests]
    assert {who["base"] for who in saved} == {known["base_fingerprint"]}
    assert {who["base_digest"] for who in saved} <= {known["base_digest"], None}
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [each["digest"] for each in events if each["event"] == "base_digest"] == [known["base_digest"]]


def test_one_changed_byte_is_seen_by_each_verb(base: Path, run_dir: Path, tmp_path: Path) -> None:
    was = json.loads((run_dir / "provenance.json").read_text())["base_digest"][:12]
    _flip(base / "model.safetensors")
    try:
        refused = {
            "resume": _start(base, f"run_dir={run_dir}", "launcher.devices=2", "train.steps=3"),
            "init_from": _start(base, f"run_dir={tmp_path / 'run'}", f"method.init_from={run_dir}"),
            "chat": warm.run("dsft.chat", run_dir, "--prompt", "hi"),
            "export": warm.run("dsft.export", run_dir, "--to", "merged", tmp_path / "out"),
        }
    finally:
        _flip(base / "model.safetensors")
    for verb, done in refused.items():
        assert (done.returncode, done.stdout) == (2, ""), (verb, done)
        assert done.stderr.startswith("dsft: "), verb
        assert done.stderr.count("\n") == 1, (verb, done.stderr)
        assert was in done.stderr, verb
    assert list(tmp_path.iterdir()) == []
    again = warm.run("dsft.export", run_dir, "--to", "merged", tmp_path / "out")
    assert again.returncode == 0, again.stderr


def test_one_changed_byte_of_a_result_is_seen_by_each_verb_that_reads_it(
    base: Path, run_dir: Path, tmp_path: Path
) -> None:
    weights = run_dir / "adapter" / "adapter_model.safetensors"
    _flip(weights, weights.stat().st_size - 5)
    try:
        refused = {
            "init_from": _start(base, f"run_dir={tmp_path / 'run'}", f"method.init_from={run_dir}"),
            "chat": warm.run("dsft.chat", run_dir, "--prompt", "hi"),
            "merged": warm.run("dsft.export", run_dir, "--to", "merged", tmp_path / "out"),
            "adapter": warm.run("dsft.export", run_dir, "--to", "adapter", tmp_path / "out"),
        }
    finally:
        _flip(weights, weights.stat().st_size - 5)
    for verb, done in refused.items():
        assert (done.returncode, done.stdout) == (2, ""), (verb, done)
        assert done.stderr.startswith("dsft: "), verb
        assert done.stderr.endswith(f"must hold its whole result, got {weights} changed; put it back\n"), done.stderr
    assert list(tmp_path.iterdir()) == []
    listed = run_dir / "adapter" / "verified.json"
    listed.rename(tmp_path / "kept")
    chat = warm.run("dsft.chat", run_dir, "--prompt", "hi")
    (tmp_path / "kept").rename(listed)
    assert (chat.returncode, chat.stdout) == (2, "")
    assert chat.stderr.endswith(f"must hold its whole result, got {listed} missing; put it back\n"), chat.stderr
