"""Diff pruning's course: the gates' penalty, and the one step after which the largest changes alone go on."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsft.course import Course
from dsft.methods.hard_concrete import FIXED, Gates, Noise


@dataclass(frozen=True)
class Entries:
    """One tensor of the base: names of w, of its gates' parameters (an element's, the tensor's), and its elements."""

    diff: str
    gate: str
    group: str | None
    size: int

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of the gates' parameters."""
        return (self.gate,) if self.group is None else (self.gate, self.group)


class Best:
    """The count largest of values that are looked at part by part; of equal ones the first. Kept: 12 bytes of each."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.seen = count, 0
        self.values = torch.empty(0, device=device)
        self.positions = torch.empty(0, dtype=torch.int64, device=device)

    def look(self, values: Tensor) -> None:
        """At the next values, flat; positions count through all parts, and stay in order."""
        every = torch.cat([self.values, values])
        where = torch.cat([
            self.positions, torch.arange(self.seen, self.seen + len(values), device=values.device)
        ])  # fmt: skip
        self.seen += len(values)
        if len(every) > self.count:
            least = every.topk(self.count, sorted=False).values.min()
            above, equal = every > least, every == least
            kept = above | (equal & (equal.cumsum(0) <= self.count - above.sum()))
            every, where = every[kept], where[kept]
        self.values, self.positions = every, where

    def among(self, first: int, count: int) -> Tensor:
        """(count,) bool: which of the positions from first on are among the best."""
        mine = self.positions[(self.positions >= first) & (self.positions < first + count)] - first
        mask = torch.zeros(count, dtype=torch.bool, device=mine.device)
        mask[mine] = True
        return mask


class Pruner(Course):
    """Gates learn until after the step called last; then the mask is in the gates' own parameters (FIXED, -FIXED).

    So what a resumed run needs is what it trains, and one flag: pruned.
    """

    def __init__(
        self, tensors: Sequence[Entries], noise: Noise, interval: tuple[float, float], device: torch.device, *,
        weight: float, count: int, last: int,
    ) -> None:  # fmt: skip
        self.tensors, self.noise, self.interval, self.device = tensors, noise, interval, device
        self.weight, self.count, self.last = weight, count, last
        self.names = tuple(name for entries in tensors for name in (entries.diff, *entries.gates))
        self.state = {"pruned": torch.zeros(1, dtype=torch.uint8)}  # on the host, which asks for it thrice a step
        self.best: Best | None = None
        self.firsts: dict[str, int] = {}
        self.told: dict[str, int] | None = None

    @property
    def pruned(self) -> bool:
        """True once the mask is fixed."""
        return bool(self.state["pruned"].item())

    @property
    def parts(self) -> Sequence[Sequence[str]]:
        """Tensor by tensor."""
        return [(entries.diff, *entries.gates) for entries in self.tensors]

    def begin_step(self, step: int) -> None:
        """Gates draw of step, or no more."""
        self.noise.step, self.noise.quiet = step, self.pruned

    def before(self, step: int) -> Iterable[Sequence[str]]:
        """The gates, while they learn."""
        return [] if self.pruned or self.weight == 0 else [entries.gates for entries in self.tensors]

    def penalty(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """Weight times the expected number of open gates, a tensor's own counted as one more (the paper's code)."""
        return self.weight * torch.stack([open_share(value, self.interval).sum() for value in values.values()]).sum()

    def after(self, step: int) -> Iterable[Sequence[str]]:
        """Every tensor twice, once the gates have learned: to find the largest changes of all, then to fix them."""
        if self.pruned or step < self.last:
            return
        self.best = best = Best(self.count, self.device)
        self.firsts = {}
        yield from self.parts
        self.told = {"kept": self.count, "of": best.seen, "tensors": 0}
        yield from self.parts
        self.state["pruned"].fill_(1)
        self.best = None

    def after_step(self, step: int, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Look, and at the second time fix: chosen entries go on from z w, all others never change again."""
        assert self.best is not None
        diff, alpha, *group = values.values()
        name = next(iter(values))
        change = Gates(*self.interval, None).whole(alpha, group[0] if group else None) * diff
        if name not in self.firsts:
            self.firsts[name] = self.best.seen
            self.best.look(change.abs().flatten())
            return {}
        chosen = self.best.among(self.firsts[name], diff.numel()).view(diff.shape)
        assert self.told is not None
        self.told["tensors"] += bool(chosen.any())
        fixed = torch.full_like(alpha, -FIXED).masked_fill_(chosen, FIXED)
        new = [torch.where(chosen, change, diff), fixed, *(torch.full_like(one, FIXED) for one in group)]
        return dict(zip(values, new, strict=True))

    def news(self) -> tuple[str, Mapping[str, object]] | None:
        """How many entries were chosen, in how many tensors, when they have been."""
        told, self.told = self.told, None
        return None if told is None else ("pruned", told)


def open_share(alpha: Tensor, interval: tuple[float, float]) -> Tensor:
    """Probability that a gate is not 0: sigmoid(alpha - log(-lower / upper))."""
    lower, upper = interval
    return torch.sigmoid(alpha - math.log(-lower / upper))
