"""Classification of sequences: cross entropy of a row's label, by a head on its last token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dsft.comm.devices import sent
from dsft.objective import Batch, Direction, Metrics, Objective, Scorer

BALANCED = "balanced"

MEASURES: Mapping[str, Direction] = {"accuracy": "max", "f1_macro": "max", "f1_micro": "max"}


@dataclass(frozen=True, kw_only=True)
class Classification(Objective):
    """The loss has one term, in nats. Its unit is a row, weighted by its class and by its own weight.

    class_weights: one per label in the order of data.labels; null: 1 each; balanced: rows / (labels x rows of a label)
    over the training data, as scikit-learn's.
    """

    wants = "labelled"
    measures = MEASURES
    head = None

    class_weights: list[float] | str | None

    def __post_init__(self) -> None:
        """Refuse weights that are none."""
        weights = self.class_weights
        if isinstance(weights, str) and weights != BALANCED:
            raise ValueError(f"objective.class_weights must be null, balanced or a list of numbers, got {weights}")
        if isinstance(weights, list | tuple) and not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError(f"objective.class_weights must be 0 or more each, got {list(weights)}")

    def count(self, batch: Batch) -> Tensor:
        """(1,): the sum of the rows' weights."""
        return self._weights(batch).sum().reshape(1)

    def losses(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Metrics]:
        """(1,): sum over rows of -log p(label) times the row's weight; confusion (labels, labels): true, predicted."""
        logits = scorer.outputs(batch).double()
        labels = batch.columns["label"].long()
        losses = F.cross_entropy(logits, labels, reduction="none") * self._weights(batch).to(logits)
        size = logits.shape[1]
        places = labels * size + logits.detach().argmax(1)
        return losses.sum().reshape(1), {"confusion": places.bincount(minlength=size**2).double().reshape(size, size)}

    def measured(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Shares of rows; F1 over the labels that rows have or were given, as scikit-learn's."""
        table = sums["confusion"]
        right, true, given = table.diagonal(), table.sum(1), table.sum(0)
        met = true + given > 0
        accuracy = float(right.sum() / table.sum())
        macro = float((2 * right[met] / (true + given)[met]).mean())
        return {"accuracy": accuracy, "f1_macro": macro, "f1_micro": accuracy}

    def check(self, labels: Sequence[str]) -> None:
        """Refuse weights for another number of labels."""
        weights = self.class_weights
        if isinstance(weights, list) and len(weights) != len(labels):
            raise ValueError(
                f"objective.class_weights must have a number for each of the {len(labels)} labels "
                f"({' '.join(labels)}), got {len(weights)}"
            )

    def knowing(self, columns: Mapping[str, NDArray[np.float64]]) -> Self:
        """With numbers in the place of balanced."""
        if self.class_weights != BALANCED:
            return self
        labels = columns["label"].astype(np.int64)
        counts = np.bincount(labels)
        weights = [float(len(labels) / (np.count_nonzero(counts) * count)) if count else 0.0 for count in counts]
        return replace(self, class_weights=weights)

    def _weights(self, batch: Batch) -> Tensor:
        """(E,) float64, where the batch is."""
        labels = batch.columns["label"].long()
        weights = batch.columns.get("weight", torch.ones(1, dtype=torch.float64, device=labels.device)).expand(
            len(labels)
        )
        if self.class_weights is None:
            return weights
        assert isinstance(self.class_weights, list), "the counts of the labels must be known"
        table = torch.tensor(self.class_weights, dtype=torch.float64)
        return weights * sent(table, labels.device)[labels]
