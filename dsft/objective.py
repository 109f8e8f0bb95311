"""The contract of an objective: the batch that it is given, the passes that it may ask for, the sums that it gives."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsft.comm.devices import sent

IGNORE = -100
"""Target of a position that carries no loss (torch's cross_entropy default)."""

Wants = Literal["text", "pair", "rated", "labelled"]
"""Kinds of rows: a text; two answers to one prompt, the better first; an answer with a verdict; a text with a label."""

Direction = Literal["max", "min"]
"""Which values of a measure are better."""

POLICY, START = "policy", "start"
"""Roles: what learns as it is now, and as it was before the first step of the run."""

BASE = "base"
"""Value of objective.reference: the model as it was before any adapter."""

GAP = "reference_gap"
"""Measure of objectives with a reference: mean over answers of |reward|, 0 before the first update."""

Metrics = Mapping[str, Tensor]
"""Name -> sums over a batch, of a shape that never changes, float64: (2,) is a sum and the count to divide it by."""


@dataclass(frozen=True)
class Batch:
    """One ragged micro-batch: S segments laid end to end, T tokens in all, never padded.

    An example is one segment or several (a pair is two: the chosen answer, the rejected one), which are never parted.
    tokens, positions, targets (T,) int64: positions restart at 0 per segment; targets[t] is the token that position t
    must predict, or IGNORE. lengths: tokens per segment, they sum to T. ids: one per example. places: where each
    example stands in the order of its step, which may hold an example twice. members: segments per example, they sum
    to S. columns: further values by name, one per example, segment or token, as who adds them says. counts: False for
    a micro-batch that a rank computes to keep up with the others; the engine multiplies its sums by 0. beside: the same
    prompts with answers to others, for an objective that asks for them.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    ids: tuple[str, ...]
    places: tuple[int, ...]
    members: tuple[int, ...]
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    counts: bool = True
    beside: "Batch | None" = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on device, in one copy (and one per column) that the host does not wait for."""
        if device == self.tokens.device:
            return self
        parts = (self.tokens, self.positions, self.targets, self.supervised)
        tokens, positions, targets, supervised = sent(torch.cat(parts), device).split([len(part) for part in parts])
        columns = {name: sent(column, device) for name, column in self.columns.items()}
        batch = replace(self, tokens=tokens, positions=positions, targets=targets, columns=columns)
        # a device would have to tell the host how many there are
        vars(batch).update(supervised=supervised, answers=self.answers)
        return batch

    def mismatch(self) -> "Batch":
        """The same prompts with answers to others."""
        assert self.beside is not None, "an objective that asks for mismatched answers must say so"
        return self.beside

    def having(self, **columns: Tensor) -> "Batch":
        """The same batch with these columns beside its own."""
        batch = replace(self, columns={**self.columns, **columns})
        known = {"supervised", "answers"} & vars(self).keys()
        vars(batch).update({name: vars(self)[name] for name in known})
        return batch

    @cached_property
    def supervised(self) -> Tensor:
        """(P,) int64: the places in targets, in order, that are not IGNORE."""
        return (self.targets != IGNORE).nonzero().flatten()

    @cached_property
    def answers(self) -> tuple[int, ...]:
        """Supervised tokens per segment; they sum to P."""
        return tuple(int((part != IGNORE).sum()) for part in self.targets.split(self.lengths))

    def by_segment(self, values: Tensor) -> Tensor:
        """(S,) float64: sums of values (P,), one per supervised token, over each segment's own."""
        return torch.stack([part.sum() for part in values.double().split(self.answers)])

    def by_answer(self, values: Tensor) -> Tensor:
        """(S,) float64: means of values (P,), one per supervised token, over each segment's own."""
        counts = torch.tensor(self.answers, dtype=torch.float64)
        return self.by_segment(values) / sent(counts, values.device)

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values (S,) of a batch of pairs, as those (S / 2,) of the chosen and of the rejected answers."""
        return values[0::2], values[1::2]


class Scorer(Protocol):
    """Calls the model on a batch."""

    def score(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """(P,) float32: -log p in nats of each supervised target, given its own segment before it.

        temperature: what all logits are divided by.
        """

    def score_with_entropy(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """(2, P) float32: the scores, and below them the entropy in nats of each distribution, without a gradient."""

    def outputs(self, batch: Batch) -> Tensor:
        """(S, labels) float32: what the model's head gives of each segment, at its last token."""


class Passes(Protocol):
    """Further forward passes that an objective may ask for before a step: without gradient, dropout or update."""

    def score(self, role: str, batches: Sequence[Batch]) -> list[Tensor]:
        """For each batch the scores (P,) of Scorer by the values of a role. Collective."""

    def sum(self, value: Tensor) -> Tensor:
        """Sum of value over all ranks. Collective."""


class Objective(ABC):
    """What the loss is: a frozen dataclass whose fields are its YAML keys. Sums, never means; no collectives.

    wants: the rows that it takes. terms: names of the K sums that losses gives. measures: names of what measured gives,
    and which values are better. compares: True if it sets forward passes beside each other, so that none may drop.
    roles: names of the values, beside the policy's own, under which it asks Passes for scores. mismatched: True if it
    asks for the same prompts with answers to others. passes: forward passes over each batch, its own among them.
    at_start: measures that are 0 before the first update. head: names of what a head of its own gives of a sequence, in
    place of the language model's; None: those of data.labels; empty: there is no such head. reference: whose values the
    role START has: start, base (what the method starts from without an adapter), or the folder of a run or its result;
    reference_cache: their scores are computed once for all rows, and these values are not kept. margins: it uses the
    column margin of pairs.
    """

    wants: ClassVar[Wants] = "text"
    terms: ClassVar[tuple[str, ...]] = ("loss",)
    measures: ClassVar[Mapping[str, Direction]] = {}
    compares: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ()
    mismatched: ClassVar[bool] = False
    passes: ClassVar[int] = 1
    at_start: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[tuple[str, ...] | None] = ()

    margins: ClassVar[bool] = False

    reference = START
    reference_cache = False

    def check(self, labels: Sequence[str]) -> None:
        """Raise ValueError, one line, if it cannot do with a head of these labels. Asked before anything is read."""

    def knowing(self, columns: Mapping[str, NDArray[np.float64]]) -> Self:
        """This objective where the columns of the rows to learn from are known, one value per example (N,)."""
        return self

    def prepare(self, passes: Passes, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The micro-batches of a step, with the columns that this objective adds. Every rank has equally many."""
        return batches

    @abstractmethod
    def count(self, batch: Batch) -> Tensor:
        """(K,) float64 on CPU: units of this batch that carry loss, one entry per term."""

    @abstractmethod
    def losses(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Metrics]:
        """(K,) SUMS over the batch's units, each term's own coefficient in it, and sums for measured, by name."""

    def measured(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Measures by name, of metrics summed over a step or an evaluation; on CPU."""
        return {name: float(total[0] / total[1]) for name, total in sums.items()}


def preferred(margins: Tensor) -> Metrics:
    """Metrics of pairs: by how much the chosen answer's reward is higher, margins (E,), and in how many it is.

    Equal rewards count as wrong.
    """
    margins = margins.detach().double()
    pairs = torch.full_like(margins, 1).sum()
    right = (margins > 0).double().sum()
    return {"reward_accuracy": torch.stack([right, pairs]), "reward_margin": torch.stack([margins.sum(), pairs])}


PREFERRED: Mapping[str, Direction] = {"reward_accuracy": "max", "reward_margin": "max"}
"""Measures of what preferred gives."""
