"""A run of two ranks with checkpoints of three steps, and what one process makes of copies of it."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.matrix_rows import write_rows
from dsft.checkpoint.store import Store
from dsft.comm.world import World
from dsft.compose import read
from dsft.engine.assemble import Session, assemble
from tests.unit.checkpoint.resuming import STEPS


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run."""
    place = tmp_path_factory.mktemp("finished")
    write_rows(place / "rows.jsonl", 10)
    words = [
        "model=tiny", "data=local", f"data.path={place / 'rows.jsonl'}", "method=lora", "strategy=fsdp",
        "launcher=local", "launcher.devices=2", "tracker=[]", "train.precision=fp32", "train.steps=6",
        "train.global_batch_size=4", "train.max_length=512", "train.compile=false", "optim.lr=1e-3",
        "checkpoint.every=3", "checkpoint.keep=9", "checkpoint.background=false", "checkpoint.verify_result=false",
    ]  # fmt: skip
    run = [sys.executable, "-m", "dsft.run", *words, f"run_dir={place / 'run'}"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [int(path.name[5:]) for path in reversed(Store(place / "run").newest_first())] == STEPS
    return place / "run"


@pytest.fixture(scope="session")
def session(finished: Path) -> Session:
    run = read(finished)
    from dsft.strategies.single import Single

    alone = World(0, 1, 0, torch.device("cpu"))
    run = replace(run, strategy=Single())
    return assemble(run, run.model.resolve(), alone)


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))
