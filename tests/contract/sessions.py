"""A session of any method of conf/method on the tiny model, in this process."""

import torch

from dsft.comm.world import World
from dsft.compose import OWN_CONF, compose
from dsft.data.open import Dataset, open_data
from dsft.engine.assemble import Session, assemble

METHODS = sorted(path.stem for path in (OWN_CONF / "method").glob("*.yaml"))
ALONE = World(0, 1, 0, torch.device("cpu"))


def session_of(method: str, *words: str) -> tuple[Session, Dataset]:
    """Three steps of four generated examples in fp32, ready to be made."""
    composed = compose([
        "model=tiny", "data=reasoning_gym", "data.size=32", "data.eval_size=0", "train.precision=fp32", "train.steps=3",
        "train.global_batch_size=4", "launcher=local", "optim.lr=1e-3", "optim.schedule=constant", f"method={method}",
        *words,
    ])  # fmt: skip
    files = composed.run.model.resolve()
    data = open_data(composed.run.data, files.tokenizer(), max_length=512, seed=0)
    return assemble(composed.run, files, ALONE), data
