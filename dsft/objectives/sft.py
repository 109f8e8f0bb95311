"""Supervised fine-tuning: cross entropy of the supervised tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsft.objective import Batch, Metrics, Objective, Scorer


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """One term (K = 1); its unit is a supervised token. Loss in nats."""

    def count(self, batch: Batch) -> Tensor:
        """(1,) float64: supervised tokens."""
        return torch.tensor([float(sum(batch.answers))], dtype=torch.float64)

    def loss(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Metrics]:
        """(1,) float32: sum over supervised tokens of -log p(token | its own example before it)."""
        return scorer.score(batch).sum().reshape(1), {}
