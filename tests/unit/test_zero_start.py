"""DeepSpeed takes LOCAL_RANK for the index of its device: it is given the one that this rank really has."""

import os
from functools import partial

import pytest
import torch
from torch import nn

from dsft.comm.world import World
from dsft.protocols import Anatomy
from dsft.strategies.zero import Zero

NOTHING = Anatomy((), {}, "", "", tied=False, experts=())


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")  # from DeepSpeed's imports
@pytest.mark.parametrize(
    ("device", "said", "local_rank", "seen"),
    [("cuda:0", "1", 1, 0), ("cuda:3", None, 1, 3), ("cpu", "1", 1, 1), ("cpu", None, 2, 2)],
)
def test_deepspeed_is_given_the_index_of_the_device(
    device: str, said: str | None, local_rank: int, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if said is not None:
        monkeypatch.setenv("LOCAL_RANK", said)
    model = nn.Linear(2, 2)
    strategy = Zero(stage=2, offload="none")
    strategy.shard(model, NOTHING, World(0, 1, local_rank, torch.device(device)), "fp32")
    groups = [{"params": list(model.named_parameters()), "lr": 0.1}]
    engine = strategy.prepare(model, groups, partial(torch.optim.SGD))
    assert engine.local_rank == seen
    assert os.environ["LOCAL_RANK"] == str(seen)  # its checks between ranks read it during training too
    strategy.close()
    assert os.environ.get("LOCAL_RANK") == said
