"""A session of any method of conf/method on the tiny model, in this process; and a run's folder without the run.

DSFT_CONFIG_DIR, which --config-dir sets for a run, names a folder whose methods are held to the contracts as well.
"""

import os
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dsft import folder
from dsft.basis import digests_of
from dsft.comm.world import World
from dsft.compose import OWN_CONF, Composed, build, compose
from dsft.data.open import Dataset, open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.loop import step_batches
from dsft.engine.result import write_result
from dsft.engine.step import train_step
from dsft.locate import TYPED
from dsft.objective import Batch

FOLDERS = [Path(folder) for folder in (os.environ.get("DSFT_CONFIG_DIR"), OWN_CONF) if folder]
"""The first that has an option gives it."""
METHODS = sorted({path.stem for folder in FOLDERS for path in (folder / "method").glob("*.yaml")})
COVER = ("adalora", "freeze", "ia3", "lora", "p_tuning", "pfeiffer", "prefix", "qat", "qlora")
"""One method of each kind of what learns."""
ALONE = World(0, 1, 0, torch.device("cpu"))


def covering(methods: Iterable[str]) -> list[Any]:
    """Parameters of a test that takes those of COVER; with the others it is slow."""
    return [name if name in COVER else pytest.param(name, marks=pytest.mark.slow) for name in methods]


def text_of(method: str) -> str:
    """Its YAML."""
    return next(path for folder in FOLDERS if (path := folder / "method" / f"{method}.yaml").is_file()).read_text()


def composed_of(method: str, *words: str) -> Composed:
    """Three steps of four generated examples in fp32."""
    found = _composed(os.environ.get("DSFT_CONFIG_DIR"), method, *words)
    return replace(found, run=build(deepcopy(found.resolved), TYPED))


@cache
def _composed(folder: str | None, method: str, *words: str) -> Composed:
    made = ("data=reasoning_gym", "data.size=32", "data.eval_size=0")
    data = () if any(word.startswith("data=") for word in words) else made
    return compose([
        "model=tiny", *data, "train.precision=fp32", "train.steps=3",
        "train.global_batch_size=4", "launcher=local", "strategy=single", "optim.lr=1e-3", "optim.schedule=constant",
        f"method={method}", *words,
    ])  # fmt: skip


def session_of(method: str, *words: str) -> tuple[Session, Dataset]:
    """Such a run, ready to be made."""
    run = composed_of(method, *words).run
    files = run.files()
    data = open_data(run.data, files.tokenizer(), max_length=512, seed=0, wants=run.objective.wants)
    run = replace(run, objective=run.objective.knowing(data.train.columns))
    return assemble(run, files, ALONE), data


def train(session: Session, data: Dataset, *steps: int) -> None:
    for step in steps:
        assert train_step(session, step_batches(session, data, step)[1], step, 1.0).moved


def batch_of(*lengths: int) -> Batch:
    """A micro-batch of examples of these lengths, whose tokens say nothing."""
    nothing = torch.zeros(sum(lengths), dtype=torch.int64)
    ids = tuple(map(str, range(len(lengths))))
    return Batch(nothing, nothing, nothing, lengths, ids, tuple(range(len(lengths))), (1,) * len(lengths))


def left_by(run_dir: Path, method: str, *words: str) -> tuple[Session, Dataset]:
    """Two steps of such a run, and what is left of it in run_dir: its configuration and its result."""
    session, data = session_of(method, "optim.lr=1e-2", *words)
    train(session, data, 1, 2)
    files = session.files
    digests = {**digests_of(files), **data.digests}
    folder.create(run_dir, composed_of(method, *words), {"model": files.name_or_path}, digests)
    write_result(session, run_dir / "adapter")
    return session, data
