"""Supervised fine-tuning: cross entropy of the supervised tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsft.protocols import IGNORE, Batch, Metrics, Objective


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """One term (K = 1); its unit is a supervised token. Loss in nats."""

    def count(self, batch: Batch) -> Tensor:
        """(1,) float64: supervised tokens."""
        return (batch.targets != IGNORE).sum(dtype=torch.float64).reshape(1)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
        """(1,) float32: sum over supervised tokens of -log p(token | its own example before it).

        A batch without a supervised token gives a zero that still has a gradient path.
        """
        scores = model(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            segment_lengths=batch.lengths,
            logits_to_keep=batch.supervised,
            targets=batch.targets[batch.supervised],
            use_cache=False,
        ).logits  # (1, supervised)
        return scores.sum().reshape(1), {}
