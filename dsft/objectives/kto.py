"""Kahneman-Tversky optimization: answers that were judged one by one, desirable or not, and no pairs.

Ethayarajh et al. 2024 (arXiv 2402.01306). The point that rewards are measured from is the mean log-ratio of mismatched
answers, of the whole step: no rank and no micro-batch has one of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsft.objective import GAP, POLICY, START, Batch, Direction, Metrics, Objective, Passes, Scorer

MEASURES: Mapping[str, Direction] = {
    "reward_margin": "max",
    "reward_desirable": "max",
    "reward_undesirable": "min",
    "kl": "min",
    GAP: "min",
}


@dataclass(frozen=True, kw_only=True)
class KTO(Objective):
    """One term; its unit is an example. Rewards are beta (log pi - log pi_ref), summed over an answer's tokens."""

    wants = "rated"
    mismatched = True
    measures = MEASURES
    compares = True
    roles = (START,)
    passes = 4
    at_start = (GAP,)

    beta: float
    desirable_weight: float
    undesirable_weight: float
    reference: str = START
    reference_cache: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.{name} must be above 0, got {getattr(self, name)}")

    def prepare(self, passes: Passes, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Add the columns reference (S,), log pi_ref of each answer, and kl (), the same for the whole step."""
        others = [batch.mismatch() for batch in batches]
        both = passes.score(START, [*batches, *others])
        scores, before = both[: len(batches)], both[len(batches) :]
        now = passes.score(POLICY, others)
        ratios = [-other.by_segment(new - old) for other, new, old in zip(others, now, before, strict=True)]
        sums = [
            torch.stack([ratio.sum(), torch.full_like(ratio, 1).sum()]) * float(other.counts)
            for ratio, other in zip(ratios, others, strict=True)
        ]
        total = passes.sum(torch.stack(sums).sum(0))
        kl = (total[0] / total[1]).clamp(min=0)
        return [
            batch.having(reference=-batch.by_segment(score), kl=kl)
            for batch, score in zip(batches, scores, strict=True)
        ]

    def count(self, batch: Batch) -> Tensor:
        """(1,): examples."""
        return torch.tensor([float(len(batch.members))], dtype=torch.float64)

    def losses(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Metrics]:
        """(1,): sum of weight (1 - sigmoid(beta (ratio - kl))), with the other sign where an answer is undesirable."""
        ratios = -batch.by_segment(scorer.score(batch)) - batch.columns["reference"]
        kl, good = batch.columns["kl"], batch.columns["label"] != 0
        sign = torch.where(good, 1.0, -1.0).to(ratios.dtype)
        weights = torch.where(good, self.desirable_weight, self.undesirable_weight).to(ratios.dtype)
        losses = weights * (1 - torch.sigmoid(sign * self.beta * (ratios - kl)))
        return losses.sum().reshape(1), self._metrics(ratios.detach(), good, kl)

    def _metrics(self, ratios: Tensor, good: Tensor, kl: Tensor) -> Metrics:
        examples = torch.full_like(ratios, 1).sum()

        def over(which: Tensor) -> Tensor:
            return torch.stack([(self.beta * ratios * which).sum(), which.double().sum()])

        return {
            "reward_desirable": over(good),
            "reward_undesirable": over(~good),
            "kl": torch.stack([kl * examples, examples]),
            GAP: torch.stack([self.beta * ratios.abs().sum(), examples]),
        }

    def measured(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Means; a mean over no example is left out, and the margin with it."""
        found = {name: float(total[0] / total[1]) for name, total in sums.items() if total[1] > 0}
        if found.keys() >= {"reward_desirable", "reward_undesirable"}:
            found["reward_margin"] = found["reward_desirable"] - found["reward_undesirable"]
        return found
