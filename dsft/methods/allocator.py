"""AdaLoRA's allocator: which triplets of all matrices keep their singular value (Zhang et al. 2023, section 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dsft.course import Course


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The cubic budget schedule (equation 12). warmup: t_i; settled: T - t_f, when the last allocation is made."""

    total: int
    warmup: int
    settled: int
    interval: int

    def budget(self, step: int, first: int, last: int) -> int:
        """Triplets that step leaves, from first down to last."""
        if step <= self.warmup:
            return first
        if step >= self.settled:
            return last
        left, span = self.settled - step, self.settled - self.warmup
        return last + (first - last) * left**3 // span**3

    def allocates(self, step: int) -> bool:
        """True if lambdas are masked after step; from settled on they always are."""
        return step >= self.settled or (step > self.warmup and step % self.interval == 0)


@dataclass(frozen=True)
class Triplets:
    """The matrices of one layer, by parameter name: Q (r, in), P (out, r), Lambda (r, 1)."""

    layer: str
    right: str
    left: str
    diagonal: str


class Allocator(Course):
    """Keeps two averages per trainable number and a flag per triplet: 8 bytes per number and one, on every rank.

    sensitivity: average of |w g|, w after the optimizer's move and g as it was clipped (as the paper's code has it);
    uncertainty: average of how far |w g| is from that; kept: 1 where the last allocation kept a triplet. Numbers lie in
    the order of names, triplets in the order of layers.
    """

    def __init__(
        self, rank: int, weight: float, betas: tuple[float, float], schedule: Schedule,
        what: tuple[Sequence[Triplets], Mapping[str, torch.Size], torch.device],
    ) -> None:  # fmt: skip
        self.triplets, shapes, device = what
        self.weight, self.betas, self.schedule = weight, betas, schedule
        self.names = tuple(name for t in self.triplets for name in (t.right, t.left, t.diagonal))
        self.shapes = [shapes[name] for name in self.names]
        self.ranks = [shapes[t.diagonal][0] for t in self.triplets]
        self.first, self.last = sum(self.ranks), rank * len(self.ranks)
        numbers = sum(shape.numel() for shape in self.shapes)
        self.state = {
            "sensitivity": torch.zeros(numbers, device=device),
            "uncertainty": torch.zeros(numbers, device=device),
            "kept": torch.ones(self.first, dtype=torch.uint8, device=device),
        }
        self.told: dict[str, int] | None = None

    def penalty(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """Weight times the mean over all P and Q of ||P^T P - I||, ||Q Q^T - I|| (Frobenius, unsquared: their code)."""
        if self.weight == 0:
            return None
        rows: dict[torch.Size, list[Tensor]] = {}
        for t in self.triplets:
            for value in (values[t.right], values[t.left].T):
                rows.setdefault(value.shape, []).append(value)
        total = torch.zeros((), device=values[self.names[0]].device)
        for alike in map(torch.stack, rows.values()):  # one product for all of a shape
            gram = alike @ alike.mT
            off = gram - torch.eye(gram.shape[-1], device=gram.device)
            total = total + torch.linalg.vector_norm(off, dim=(1, 2)).sum()
        return self.weight * total / (2 * len(self.triplets))

    def wants_gradients(self, step: int) -> bool:
        """Until the last allocation."""
        return step < self.schedule.settled

    def after_step(self, step: int, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Average, allocate where it is due, and mask: the lambdas that change."""
        if gradients:
            self._average(values, gradients)
        if not self.schedule.allocates(step):
            return {}
        budget = self.schedule.budget(step, self.first, self.last)
        kept = self.state["kept"].tolist()  # asked for once: each look at a device waits for it
        missed = sum(kept) != budget  # the last allocation fell on a step that did not move
        if step <= self.schedule.settled or missed:
            kept = self._allocate(budget, kept)
        masks = self.state["kept"].bool().split(self.ranks)
        layers = zip(self.triplets, masks, self._by_layer(kept), strict=True)
        return {t.diagonal: values[t.diagonal] * mask[:, None] for t, mask, flags in layers if not all(flags)}

    def _by_layer(self, flags: Sequence[int]) -> list[Sequence[int]]:
        """A flag per triplet, cut where a layer ends."""
        ends = list(accumulate(self.ranks))
        return [flags[end - rank : end] for end, rank in zip(ends, self.ranks, strict=True)]

    def news(self) -> tuple[str, Mapping[str, object]] | None:
        """The ranks of all layers, when an allocation has changed them."""
        told, self.told = self.told, None
        return None if told is None else ("ranks", {"budget": sum(told.values()), "ranks": told})

    def _average(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Equations 8 to 10, element by element."""
        products = [(values[name] * gradients[name]).abs_().flatten() for name in self.names]
        importance = torch.cat(products)
        mean, spread = self.state["sensitivity"], self.state["uncertainty"]
        mean.mul_(self.betas[0]).add_(importance, alpha=1 - self.betas[0])
        spread.mul_(self.betas[1]).add_((importance - mean).abs_(), alpha=1 - self.betas[1])

    def scores(self) -> Tensor:
        """Of each triplet: s(lambda) + the means of s over its row of Q and its column of P, s = mean x spread."""
        elements = self.state["sensitivity"] * self.state["uncertainty"]
        parts = elements.split([shape.numel() for shape in self.shapes])
        whole = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        layers = zip(whole[0::3], whole[1::3], whole[2::3], strict=True)
        return torch.cat([right.mean(1) + left.mean(0) + diagonal[:, 0] for right, left, diagonal in layers])

    def _allocate(self, budget: int, before: list[int]) -> list[int]:
        """The best triplets of all layers are kept, so many to the one; among equals the first. Returns their flags."""
        best = torch.sort(self.scores(), descending=True, stable=True).indices[:budget]
        self.state["kept"].zero_()[best] = 1
        kept: list[int] = self.state["kept"].tolist()
        if kept != before:
            self.told = {t.layer: sum(flags) for t, flags in zip(self.triplets, self._by_layer(kept), strict=True)}
        return kept
