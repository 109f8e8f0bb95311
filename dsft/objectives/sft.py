"""Supervised fine-tuning: cross entropy of the supervised tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsft.comm.devices import sent
from dsft.objective import Batch, Metrics, Objective, Scorer


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """One term; its unit is a supervised token, times the weight of its row where rows have one. Loss in nats."""

    def count(self, batch: Batch) -> Tensor:
        """(1,) float64: supervised tokens, each times its row's weight."""
        answers = torch.tensor(batch.answers, dtype=torch.float64)
        weights = batch.columns.get("weight")
        return (answers if weights is None else answers * weights.cpu()).sum().reshape(1)

    def losses(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Metrics]:
        """(1,): sum over supervised tokens of -log p(token | its own example before it), times the row's weight."""
        scores = scorer.score(batch)
        if (weights := batch.columns.get("weight")) is not None:
            answers = sent(torch.tensor(batch.answers), scores.device)
            scores = scores * weights.repeat_interleave(answers, output_size=len(scores))
        return scores.sum().reshape(1), {}
