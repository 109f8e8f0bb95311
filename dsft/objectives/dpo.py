"""Direct preference optimization: the chosen answer more likely against the rejected one than under the reference.

Rafailov et al. 2023 (arXiv 2305.18290); conservative by label smoothing: Mitchell 2023; ipo: Azar et al. 2023 (arXiv
2310.12036), with sums of log-probabilities as in the paper; hinge: Zhao et al. 2023 (SLiC, arXiv 2305.10425).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dsft.objective import GAP, PREFERRED, START, Batch, Direction, Metrics, Objective, Passes, Scorer, preferred

Loss = Literal["sigmoid", "ipo", "hinge"]
"""Values of objective.loss."""

MEASURES: Mapping[str, Direction] = {**PREFERRED, GAP: "min"}


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """One term; its unit is a pair. Rewards are beta (log pi - log pi_ref), summed over an answer's tokens."""

    wants = "pair"
    measures = MEASURES
    compares = True
    roles = (START,)
    passes = 2
    at_start = (GAP,)

    beta: float
    loss: Loss
    label_smoothing: float
    reference: str = START
    reference_cache: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not self.beta > 0:
            raise ValueError(f"objective.beta must be above 0, got {self.beta}")
        if self.loss not in get_args(Loss):
            raise ValueError(f"objective.loss must be one of {' '.join(get_args(Loss))}, got {self.loss}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"objective.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"objective.label_smoothing must be 0 for objective.loss={self.loss}, got {self.label_smoothing}; "
                "take objective.loss=sigmoid"
            )

    def prepare(self, passes: Passes, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Add the column reference (S,): log pi_ref of each answer."""
        scores = passes.score(START, batches)
        return [batch.having(reference=-batch.by_segment(score)) for batch, score in zip(batches, scores, strict=True)]

    def count(self, batch: Batch) -> Tensor:
        """(1,): pairs."""
        return torch.tensor([float(len(batch.members))], dtype=torch.float64)

    def losses(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Metrics]:
        """(1,): sum over pairs of f(beta ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)))."""
        ratios = -batch.by_segment(scorer.score(batch)) - batch.columns["reference"]
        chosen, rejected = batch.sides(ratios)
        margin = self.beta * (chosen - rejected)
        gaps = self.beta * ratios.detach().abs()
        gap = torch.stack([gaps.sum(), torch.full_like(gaps, 1).sum()])
        return self._of(margin).sum().reshape(1), {**preferred(margin), GAP: gap}

    def _of(self, margin: Tensor) -> Tensor:
        """The loss of each pair (E,), by its margin in rewards."""
        if self.loss == "hinge":
            return (1 - margin).relu()
        if self.loss == "ipo":
            return (margin / self.beta - 1 / (2 * self.beta)) ** 2
        smooth = self.label_smoothing
        return -(1 - smooth) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin)
