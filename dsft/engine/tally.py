"""Sums of an objective's terms and metrics over micro-batches and ranks; here alone a sum is divided by its count."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsft.comm.world import World
from dsft.objective import Batch, Metrics, Objective


@dataclass(frozen=True)
class Measured:
    """Of a step or an evaluation, over all ranks. loss: the sum of the terms, each a sum over its units / their count.

    terms: by name, where they are several; measures: what else the objective measured, by name.
    """

    loss: float
    terms: Mapping[str, float]
    measures: Mapping[str, float]
    tokens: int
    supervised: int

    @property
    def named(self) -> dict[str, float]:
        """The loss, its terms as loss/TERM, and the measures."""
        return {"loss": self.loss, **{f"loss/{name}": value for name, value in self.terms.items()}, **self.measures}


def counted(objective: Objective, batches: Iterable[Batch]) -> Tensor:
    """(K + 2,) float64 on the CPU: the units of each term, then tokens and supervised tokens; silent ones have none."""
    rows = [
        torch.cat([objective.count(batch), torch.tensor([len(batch.tokens), sum(batch.answers)], dtype=torch.float64)])
        * torch.tensor([float(batch.counts)] * len(objective.terms) + [1.0, float(batch.counts)])
        for batch in batches
    ]
    return torch.stack(rows).sum(0)


def per_unit(totals: Tensor) -> Tensor:
    """(K,): what each term's sum is to be divided by, of totals (K + 2,) as counted gives them; 1 where it is 0."""
    return totals[:-2].where(totals[:-2] != 0, 1)


class Tally:
    """Adds up micro-batch after micro-batch, in float64 on the device."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective = objective
        self.terms = torch.zeros(len(objective.terms), dtype=torch.float64, device=device)
        self.metrics: dict[str, Tensor] = {}

    def add(self, terms: Tensor, metrics: Metrics, *, counts: bool) -> None:
        """Add terms (K,), already 0 where the micro-batch does not count, and its metrics if it does."""
        self.terms += terms.detach().double()
        for name, value in metrics.items():
            value = value.detach().double() if counts else torch.zeros_like(value, dtype=torch.float64)
            self.metrics[name] = self.metrics[name] + value if name in self.metrics else value

    def measured(self, world: World, totals: Tensor) -> Measured:
        """Sums over all ranks / totals (K + 2,), those of counted over all ranks. The host waits once. Collective."""
        mine = torch.cat([self.terms, *(value.flatten() for value in self.metrics.values())])
        sizes = [len(self.terms), *(value.numel() for value in self.metrics.values()), len(totals)]
        sums, *parts, totals = torch.cat([world.sum(mine), totals.to(mine.device)]).cpu().split(sizes)
        found = {
            name: part.reshape(value.shape) for (name, value), part in zip(self.metrics.items(), parts, strict=True)
        }
        terms = (sums / per_unit(totals)).tolist()
        names = self.objective.terms
        return Measured(
            loss=sum(terms),
            terms=dict(zip(names, terms, strict=True)) if len(names) > 1 else {},
            measures=self.objective.measured(found),
            tokens=int(totals[-2]),
            supervised=int(totals[-1]),
        )
