"""Simple preference optimization: by mean log-probabilities, with a margin that the chosen answer must have.

Meng, Xia and Chen 2024 (arXiv 2405.14734). No reference.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsft.objective import PREFERRED, Batch, Metrics, Objective, Scorer, preferred


@dataclass(frozen=True, kw_only=True)
class SimPO(Objective):
    """One term; its unit is a pair. An answer's reward is beta times the mean log-probability of its tokens."""

    wants = "pair"
    measures = PREFERRED

    beta: float
    gamma: float

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not self.beta > 0:
            raise ValueError(f"objective.beta must be above 0, got {self.beta}")
        if not self.gamma >= 0:
            raise ValueError(f"objective.gamma must be 0 or more, got {self.gamma}; it is a margin in rewards")

    def count(self, batch: Batch) -> Tensor:
        """(1,): pairs."""
        return torch.tensor([float(len(batch.members))], dtype=torch.float64)

    def losses(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Metrics]:
        """(1,): sum over pairs of -log sigmoid(reward(chosen) - reward(rejected) - gamma)."""
        chosen, rejected = batch.sides(-self.beta * batch.by_answer(scorer.score(batch)))
        margin = chosen - rejected
        return -F.logsigmoid(margin - self.gamma).sum().reshape(1), preferred(margin)
