"""Sums over micro-batches and segments are kept in float64: float32 loses what is small beside them."""

import pytest
import torch
from torch import Tensor

from dsft.comm.world import World
from dsft.engine.tally import Tally
from dsft.objective import Batch, Metrics
from dsft.objectives.dpo import DPO

LARGE, SMALL = 2.0**24, 64
"""float32 cannot hold LARGE + 1."""


class Narrow(Tally):
    """A tally that adds up in float32."""

    def add(self, terms: Tensor, metrics: Metrics, *, counts: bool) -> None:
        super().add(terms, metrics, counts=counts)
        self.terms = self.terms.float().double()
        self.metrics = {name: value.float().double() for name, value in self.metrics.items()}


@pytest.mark.parametrize(("kind", "lost"), [(Tally, 0), (Narrow, SMALL)])
def test_what_is_small_counts_beside_what_is_large(kind: type[Tally], lost: int) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    tally = kind(DPO(beta=0.1, loss="sigmoid", label_smoothing=0.0), world.device)
    for value in (LARGE, *[1.0] * SMALL):
        margin = torch.tensor([value, 1.0])
        tally.add(torch.tensor([value]), {"reward_margin": margin}, counts=True)
    found = tally.measured(world, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert found.loss == LARGE + SMALL - lost
    assert found.measures["reward_margin"] == (LARGE + SMALL - lost) / (1 + SMALL)


def test_a_long_answer_is_added_up_in_float64() -> None:
    values = torch.tensor([LARGE, *[1.0] * 3])
    tokens = torch.arange(len(values))
    batch = Batch(tokens, tokens, tokens, (len(tokens),), ("a",), (0,), (1,))
    assert batch.by_segment(values).item() == LARGE + 3
    assert values.sum().item() != LARGE + 3
