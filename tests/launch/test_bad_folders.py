"""Run folders that cannot go on, through the real command line: exit 2, one line, nothing written; and the ways out."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dsft.checkpoint import manifest
from tests.launch.refusals import good, is_refused, start

WORDS = (
    "model=tiny", "method=lora", "train.steps=2", "train.precision=fp32", "launcher=local", "launcher.devices=1",
    "tracker=[none]", "checkpoint.verify_result=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps that is done, beside its rows."""
    folder = tmp_path_factory.mktemp("finished")
    done = start(*good(folder), *WORDS, f"run_dir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder


def _again(finished: Path, run_dir: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    """The same command on a copy of that folder."""
    return start("data=local", f"data.path={finished / 'rows.jsonl'}", *WORDS, f"run_dir={run_dir}", *more)


def _without_a_result(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "adapter")


def _torn(run_dir: Path) -> None:
    os.truncate(run_dir / "adapter" / "adapter_model.safetensors", 20_000)


def _one_flipped_bit(run_dir: Path) -> None:
    file = run_dir / "adapter" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)


def _of_a_later_dsft(run_dir: Path) -> None:
    file = run_dir / "checkpoints" / "step-00000002" / manifest.FILE
    content = {**json.loads(file.read_text()), "weather": "fine"}
    content.pop("digest")
    file.write_text(json.dumps({**content, "digest": manifest._digest(content)}))
    (run_dir / "status.json").unlink()


def _without_checkpoints(run_dir: Path) -> None:
    for place in (run_dir / "checkpoints").glob("step-*"):
        shutil.rmtree(place)


def _nothing_at_all(run_dir: Path) -> None:
    _without_checkpoints(run_dir)
    _without_a_result(run_dir)


def _unreadable_checkpoint(run_dir: Path) -> None:
    (run_dir / "status.json").unlink()
    (run_dir / "checkpoints" / "step-00000002").chmod(0)


def _unreadable_status(run_dir: Path) -> None:
    (run_dir / "status.json").chmod(0)


DAMAGES: dict[Callable[[Path], None], tuple[list[str], str]] = {
    _without_a_result: ([], "missing; put it back, or remove"),
    _torn: ([], "adapter_model.safetensors with 20,000 bytes"),
    _one_flipped_bit: ([], "adapter_model.safetensors changed; put it back, or remove"),
    _nothing_at_all: ([], "put it back, or train it again with resume.anew=true"),
    _of_a_later_dsft: ([], "step-00000002 was made by a later dsft"),
    _without_checkpoints: (["train.steps=3"], "holds no checkpoint to go on from"),
    _unreadable_checkpoint: ([], "step-00000002: Permission denied"),
    _unreadable_status: ([], "status.json cannot be read (Permission denied)"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_a_folder_that_cannot_go_on_is_refused_in_one_line(damage, finished: Path, tmp_path: Path) -> None:
    more, expected = DAMAGES[damage]
    run_dir = tmp_path / "run"
    shutil.copytree(finished / "run", run_dir)
    damage(run_dir)
    before = sorted(path.relative_to(run_dir) for path in run_dir.rglob("*"))
    is_refused(_again(finished, run_dir, *more), expected)
    assert sorted(path.relative_to(run_dir) for path in run_dir.rglob("*")) == before


@pytest.mark.parametrize("damage", [_torn, _without_a_result], ids=lambda each: each.__name__)
def test_without_its_status_a_run_writes_its_result_anew(damage, finished: Path, tmp_path: Path) -> None:
    run_dir, weights = tmp_path / "run", "adapter/adapter_model.safetensors"
    shutil.copytree(finished / "run", run_dir)
    damage(run_dir)
    (run_dir / "status.json").unlink()
    done = _again(finished, run_dir)
    assert done.returncode == 0, done.stderr
    assert (run_dir / weights).read_bytes() == (finished / "run" / weights).read_bytes()
    assert (run_dir / "metrics.jsonl").read_bytes() == (finished / "run" / "metrics.jsonl").read_bytes()
    again = _again(finished, run_dir)
    assert (again.returncode, again.stdout) == (0, f"{run_dir} is done already; its result is in {run_dir}/adapter\n")


@pytest.mark.parametrize("damage", [_nothing_at_all, _of_a_later_dsft], ids=lambda each: each.__name__)
def test_resume_anew_trains_it_again_and_keeps_what_was_there(damage, finished: Path, tmp_path: Path) -> None:
    run_dir, weights = tmp_path / "run", "adapter/adapter_model.safetensors"
    shutil.copytree(finished / "run", run_dir)
    damage(run_dir)
    done = _again(finished, run_dir, "resume.anew=true")
    assert done.returncode == 0, done.stderr
    assert "move to" in done.stdout
    assert (run_dir / weights).read_bytes() == (finished / "run" / weights).read_bytes()
    before = run_dir / "before-1"
    assert (before / "metrics.jsonl").read_bytes() == (finished / "run" / "metrics.jsonl").read_bytes()
    assert json.loads((run_dir / "status.json").read_text())["attempts"] == 1
    again = _again(finished, run_dir)
    assert (again.returncode, again.stderr) == (0, "")
    assert not (run_dir / "before-2").exists()
