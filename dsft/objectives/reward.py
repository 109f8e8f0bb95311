"""A reward model: the chosen answer's reward above the rejected one's (Bradley and Terry 1952).

As in Ouyang et al. 2022 (arXiv 2203.02155); the margin of a pair: Touvron et al. 2023 (arXiv 2307.09288); rewards near
0: Eisenstein et al. 2023 (arXiv 2312.09244).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsft.objective import PREFERRED, Batch, Direction, Metrics, Objective, Scorer, preferred

MEASURES: Mapping[str, Direction] = dict(PREFERRED)


@dataclass(frozen=True, kw_only=True)
class Reward(Objective):
    """One term; its unit is a pair. The reward of an answer is what the head gives of its last token."""

    wants = "pair"
    measures = MEASURES
    head = ("reward",)
    margins = True

    center: float

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not self.center >= 0:
            raise ValueError(f"objective.center must be 0 or more, got {self.center}")

    def count(self, batch: Batch) -> Tensor:
        """(1,): pairs."""
        return torch.tensor([float(len(batch.members))], dtype=torch.float64)

    def losses(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Metrics]:
        """(1,): sum over pairs of -log sigmoid(r_chosen - r_rejected - margin) + center (r_chosen + r_rejected)^2."""
        chosen, rejected = batch.sides(scorer.outputs(batch)[:, 0].double())
        apart = chosen - rejected
        wanted = apart - batch.columns["margin"].to(apart) if "margin" in batch.columns else apart
        losses = -F.logsigmoid(wanted) + self.center * (chosen + rejected) ** 2
        return losses.sum().reshape(1), preferred(apart)
