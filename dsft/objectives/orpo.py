"""Odds-ratio preference optimization: the chosen answer is learned, and its odds are raised over the rejected one's.

Hong, Lee and Thorne 2024 (arXiv 2403.07691). No reference.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsft.objective import PREFERRED, Batch, Metrics, Objective, Scorer, preferred

CERTAIN = -1e-12
"""Log-probabilities are taken no higher: the odds of a certain answer are not finite."""


@dataclass(frozen=True, kw_only=True)
class ORPO(Objective):
    """Two terms: nll, by supervised token of the chosen answers, and odds, by pair, times beta (the paper's lambda)."""

    wants = "pair"
    terms = ("nll", "odds")
    measures = PREFERRED

    beta: float

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not self.beta > 0:
            raise ValueError(f"objective.beta must be above 0, got {self.beta}")

    def count(self, batch: Batch) -> Tensor:
        """(2,): supervised tokens of the chosen answers, pairs."""
        return torch.tensor([sum(batch.answers[0::2]), len(batch.members)], dtype=torch.float64)

    def losses(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Metrics]:
        """(2,): sum of -log p over the chosen answers' tokens; beta sum of -log sigmoid(log odds ratio) over pairs.

        The probability of an answer is the geometric mean over its tokens.
        """
        scores = scorer.score(batch)
        nll = batch.sides(batch.by_segment(scores))[0].sum()
        chosen, rejected = batch.sides(_log_odds(-batch.by_answer(scores)))
        odds = -self.beta * F.logsigmoid(chosen - rejected).sum()
        return torch.stack([nll, odds]), preferred(chosen - rejected)


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)), with log(1 - p) by Maechler 2012: exact for p near 0 and near 1."""
    log_p = log_p.clamp(max=CERTAIN)
    near = log_p > -math.log(2)
    # The branch that is not taken must not give NaN to the gradient.
    low, high = log_p.where(near, CERTAIN), log_p.where(~near, -1.0)
    return log_p - torch.where(near, (-torch.expm1(low)).log(), torch.log1p(-high.exp()))
