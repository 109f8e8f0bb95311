"""A toy objective: cross entropy that looks away from what is learned already (Lin et al. 2017, arXiv:1708.02002)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsft.objective import Batch, Direction, Metrics, Objective, Scorer

MEASURES: Mapping[str, Direction] = {"probability": "max"}


@dataclass(frozen=True, kw_only=True)
class Focal(Objective):
    """One term; its unit is a supervised token, whose loss is (1 - p)^gamma -log p."""

    measures = MEASURES

    gamma: float

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.gamma < 0:
            raise ValueError(f"objective.gamma must be 0 or more, got {self.gamma}")

    def count(self, batch: Batch) -> Tensor:
        """(1,): supervised tokens."""
        return torch.tensor([float(sum(batch.answers))], dtype=torch.float64)

    def losses(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Metrics]:
        """(1,): sum over supervised tokens."""
        scores = scorer.score(batch)
        p = (-scores).exp()
        known = p.detach().double()
        loss = ((1 - p) ** self.gamma * scores).sum().reshape(1)
        return loss, {"probability": torch.stack([known.sum(), torch.full_like(known, 1).sum()])}
