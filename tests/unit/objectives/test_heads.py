"""Losses on a head are their formulas, begin at their known values, and their measures are those of the field."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from dsft.objective import IGNORE, Batch
from dsft.objectives.classification import Classification
from dsft.objectives.reward import Reward

LENGTHS = (3, 2, 4, 2)


class Outputs:
    """A scorer whose outputs are given, (S, labels)."""

    def __init__(self, outputs: Tensor) -> None:
        self.given = outputs

    def outputs(self, batch: Batch) -> Tensor:
        """As given."""
        return self.given

    def score(self, batch: Batch) -> Tensor:
        """Never asked for."""
        raise AssertionError


def batch_of(members: tuple[int, ...], columns: Mapping[str, Tensor]) -> Batch:
    """Segments of which no token is supervised."""
    tokens = torch.zeros(sum(LENGTHS), dtype=torch.long)
    ids = tuple(f"a:{index}" for index in range(len(members)))
    places = tuple(range(len(members)))
    return Batch(tokens, tokens, torch.full_like(tokens, IGNORE), LENGTHS, ids, places, members, columns)


def drawn(labels: int) -> Tensor:
    """Random outputs of four segments."""
    return torch.randn(4, labels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("margins", [None, (0.5, 2.0)])
def test_a_reward_loss_is_that_of_bradley_and_terry(center: float, margins: tuple[float, float] | None) -> None:
    columns = {} if margins is None else {"margin": torch.tensor(margins, dtype=torch.float64)}
    batch, objective, given = batch_of((2, 2), columns), Reward(center=center), drawn(1)
    expected = 0.0
    for index in (0, 1):
        chosen, rejected = float(given[2 * index]), float(given[2 * index + 1])
        wanted = chosen - rejected - (margins[index] if margins else 0.0)
        expected += math.log(1 + math.exp(-wanted)) + center * (chosen + rejected) ** 2
    losses, metrics = objective.losses(Outputs(given), batch)
    assert float(losses) == pytest.approx(expected, rel=1e-6)
    assert objective.count(batch).tolist() == [2.0]
    right = sum(float(given[2 * index]) > float(given[2 * index + 1]) for index in (0, 1))
    assert objective.measured(metrics)["reward_accuracy"] == right / 2
    assert torch.autograd.gradcheck(lambda x: objective.losses(Outputs(x), batch)[0], given.requires_grad_(True))


def test_heads_of_zeros_begin_at_ln_2_and_at_the_logarithm_of_the_number_of_labels() -> None:
    loss, metrics = Reward(center=0.1).losses(Outputs(torch.zeros(4, 1)), batch_of((2, 2), {}))
    assert float(loss) == 2 * math.log(2)
    assert metrics["reward_accuracy"].tolist() == [0, 2], "equal rewards are not right"
    labels = {"label": torch.tensor([0, 1, 2, 2])}
    loss, _ = Classification(class_weights=None).losses(Outputs(torch.zeros(4, 3)), batch_of((1,) * 4, labels))
    assert float(loss) == pytest.approx(4 * math.log(3), abs=1e-12)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("own", [None, (1.0, 3.0, 0.5, 1.0)])
def test_classification_is_weighted_cross_entropy(weights: list[float] | None, own: tuple[float, ...] | None) -> None:
    labels = torch.tensor([0, 1, 2, 2])
    columns = {"label": labels} | ({"weight": torch.tensor(own, dtype=torch.float64)} if own else {})
    batch, objective, given = batch_of((1,) * 4, columns), Classification(class_weights=weights), drawn(3)
    each = [
        (weights[label] if weights else 1.0) * (own[row] if own else 1.0) for row, label in enumerate(labels.tolist())
    ]
    expected = sum(w * (row.exp().sum().log() - row[y]) for w, row, y in zip(each, given, labels, strict=True))
    assert float(objective.losses(Outputs(given), batch)[0]) == pytest.approx(float(expected), rel=1e-6)
    assert objective.count(batch).tolist() == pytest.approx([sum(each)])
    assert torch.autograd.gradcheck(lambda x: objective.losses(Outputs(x), batch)[0], given.requires_grad_(True))


def test_measures_are_those_of_the_confusion_of_all_rows() -> None:
    """By hand: true 0 0 1 2 2 2, predicted 0 1 1 2 0 2; no row has, nor is given, the label 3."""
    table = torch.zeros(4, 4, dtype=torch.float64)
    for true, given in zip((0, 0, 1, 2, 2, 2), (0, 1, 1, 2, 0, 2), strict=True):
        table[true, given] += 1
    found = Classification(class_weights=None).measured({"confusion": table})
    f1 = [2 * 1 / (2 + 2), 2 * 1 / (1 + 2), 2 * 2 / (3 + 2)]
    assert found == pytest.approx({"accuracy": 4 / 6, "f1_macro": sum(f1) / 3, "f1_micro": 4 / 6})


def test_measures_are_scikit_learn_s() -> None:
    """Its 1.9.1 gave these figures; one label is never predicted."""
    true, given = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3], [0, 1, 0, 1, 2, 2, 2, 0, 2, 1]
    table = torch.zeros(4, 4, dtype=torch.float64)
    for place in zip(true, given, strict=True):
        table[place] += 1
    found = Classification(class_weights=None).measured({"confusion": table})
    assert found == pytest.approx({"accuracy": 0.6, "f1_macro": 0.45416666666666666, "f1_micro": 0.6}, abs=1e-12)


def test_measures_add_up_over_batches() -> None:
    given, labels = drawn(3), torch.tensor([0, 1, 2, 2])
    objective = Classification(class_weights=None)
    _, metrics = objective.losses(Outputs(given), batch_of((1,) * 4, {"label": labels}))
    right = (given.argmax(1) == labels).double().mean()
    doubled = {name: 2 * value for name, value in metrics.items()}
    assert objective.measured(doubled)["accuracy"] == objective.measured(metrics)["accuracy"] == float(right)


def test_balanced_weights_are_rows_over_labels_times_their_rows() -> None:
    known = Classification(class_weights="balanced").knowing({"label": np.array([0, 0, 0, 2], dtype=np.float64)})
    assert known.class_weights == pytest.approx([4 / (2 * 3), 0.0, 4 / (2 * 1)])
    assert Classification(class_weights=None).knowing({}).class_weights is None


BAD = [
    (lambda: Reward(center=-1.0), "objective.center must be 0 or more, got -1.0"),
    (lambda: Classification(class_weights="even"), "must be null, balanced or a list of numbers, got even"),
    (lambda: Classification(class_weights=[1.0, -1.0]), "must be 0 or more each"),
    (
        lambda: Classification(class_weights=[1.0]).check(["a", "b"]),
        r"a number for each of the 2 labels \(a b\), got 1",
    ),
]


@pytest.mark.parametrize(("made", "message"), BAD)
def test_settings_that_are_refused(made: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()  # type: ignore[operator]
