"""Each preference loss is the paper's formula, begins at its known value, and has the gradient of what it computes."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dsft.objective import IGNORE, Batch, Objective
from dsft.objectives.dpo import DPO
from dsft.objectives.orpo import ORPO
from dsft.objectives.simpo import SimPO

LENGTHS = (5, 4, 7, 3)
"""Tokens per segment: two pairs; the first token of each is its prompt."""


class Given:
    """A scorer whose -log p are given: (P,), by supervised token."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def score(self, batch: Batch) -> Tensor:
        """As given."""
        return self.scores


def batch_of(reference: Tensor | None = None) -> Batch:
    """Two pairs, all tokens but the first of each side supervised."""
    targets = torch.cat([torch.tensor([1] * (length - 1) + [IGNORE]) for length in LENGTHS])
    batch = Batch(
        tokens=torch.zeros_like(targets),
        positions=torch.zeros_like(targets),
        targets=targets,
        lengths=LENGTHS,
        ids=("a:0", "a:1"),
        places=(0, 1),
        members=(2, 2),
    )
    return batch if reference is None else batch.having(reference=reference)


def answers(log_p: Tensor) -> list[Tensor]:
    """The log-probabilities of each answer's tokens."""
    return list(log_p.split([length - 1 for length in LENGTHS]))


def dpo(log_p: Tensor, reference: Tensor, beta: float) -> Tensor:
    """beta times the difference of the log ratios of each pair."""
    ratios = [float(part.sum() - ref) for part, ref in zip(answers(log_p), reference, strict=True)]
    return torch.tensor([beta * (w - x) for w, x in zip(ratios[::2], ratios[1::2], strict=True)], dtype=torch.float64)


def sigmoid(value: Tensor) -> Tensor:
    """The logistic function, from its definition."""
    return 1 / (1 + (-value).exp())


def orpo(log_p: Tensor, beta: float) -> Tensor:
    """Negative log-likelihood of the chosen answers' tokens, and beta times the odds-ratio loss."""
    p = [float(part.mean().exp()) for part in answers(log_p)]
    odds = [value / (1 - value) for value in p]
    ratio = [math.log(w / x) for w, x in zip(odds[::2], odds[1::2], strict=True)]
    nll = -sum(float(part.sum()) for part in answers(log_p)[::2])
    return torch.tensor([nll, beta * sum(-math.log(1 / (1 + math.exp(-r))) for r in ratio)], dtype=torch.float64)


def simpo(log_p: Tensor, beta: float, gamma: float) -> Tensor:
    """By mean log-probabilities."""
    rewards = [beta * float(part.mean()) for part in answers(log_p)]
    margins = [w - x - gamma for w, x in zip(rewards[::2], rewards[1::2], strict=True)]
    return torch.tensor([sum(-math.log(1 / (1 + math.exp(-m))) for m in margins)], dtype=torch.float64)


FORMULAS: Sequence[tuple[Objective, Callable[[Tensor, Tensor], Tensor]]] = (
    (DPO(beta=0.3, loss="sigmoid", label_smoothing=0.0), lambda p, r: -sigmoid(dpo(p, r, 0.3)).log().sum()),
    (
        DPO(beta=0.3, loss="sigmoid", label_smoothing=0.1),
        lambda p, r: (-0.9 * sigmoid(dpo(p, r, 0.3)).log() - 0.1 * sigmoid(-dpo(p, r, 0.3)).log()).sum(),
    ),
    (
        DPO(beta=0.3, loss="ipo", label_smoothing=0.0),
        lambda p, r: (dpo(p, r, 1.0) - 1 / (2 * 0.3)).square().sum(),
    ),
    (DPO(beta=0.3, loss="hinge", label_smoothing=0.0), lambda p, r: (1 - dpo(p, r, 0.3)).clamp(min=0).sum()),
    (ORPO(beta=0.2), lambda p, r: orpo(p, 0.2)),
    (SimPO(beta=2.0, gamma=0.5), lambda p, r: simpo(p, 2.0, 0.5)),
)


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """-log p of each supervised token (P,), float64, and the reference's log p of each answer (4,)."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(sum(LENGTHS) - len(LENGTHS), dtype=torch.float64, generator=generator) * 2 + 0.1
    reference = -torch.rand(len(LENGTHS), dtype=torch.float64, generator=generator) * 9
    return scores, reference


@pytest.mark.parametrize("number", range(len(FORMULAS)))
def test_a_loss_is_the_papers(number: int) -> None:
    objective, formula = FORMULAS[number]
    for seed in range(5):
        scores, reference = drawn(seed)
        terms, _ = objective.losses(Given(scores.float()), batch_of(reference))
        expected = formula(-scores.float().double(), reference).reshape(terms.shape)
        assert torch.allclose(terms.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("number", range(len(FORMULAS)))
def test_a_gradient_is_that_of_finite_differences(number: int) -> None:
    objective, _ = FORMULAS[number]
    scores, reference = drawn(7)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective.losses(Given(x), batch_of(reference))[0], (scores,))


@pytest.mark.parametrize(
    ("objective", "start"),
    [
        (DPO(beta=0.1, loss="sigmoid", label_smoothing=0.0), math.log(2)),
        (DPO(beta=0.1, loss="sigmoid", label_smoothing=0.3), math.log(2)),
        (DPO(beta=0.1, loss="ipo", label_smoothing=0.0), 25.0),
        (DPO(beta=0.1, loss="hinge", label_smoothing=0.0), 1.0),
    ],
    ids=["sigmoid", "smoothed", "ipo", "hinge"],
)
def test_the_loss_of_a_policy_that_is_its_reference(objective: DPO, start: float) -> None:
    scores, _ = drawn(3)
    batch = batch_of()
    batch = batch.having(reference=-batch.by_segment(scores))
    terms, metrics = objective.losses(Given(scores), batch)
    assert terms.item() / objective.count(batch).item() == pytest.approx(start, abs=1e-12)
    assert objective.measured(metrics) == {"reward_accuracy": 0.0, "reward_margin": 0.0, "reference_gap": 0.0}


def test_odds_of_an_answer_that_is_certain() -> None:
    """log(1 - p) of p near 1 is no infinity, and its gradient no NaN."""
    scores = torch.full((sum(LENGTHS) - len(LENGTHS),), 1e-9, dtype=torch.float64, requires_grad=True)
    terms, _ = ORPO(beta=0.1).losses(Given(scores), batch_of())
    (slope,) = torch.autograd.grad(terms.sum(), scores)
    assert torch.isfinite(terms).all()
    assert torch.isfinite(slope).all()


def test_the_odds_ratio_of_the_papers_example() -> None:
    """Mean log-probabilities -1 and -2: log odds ratio 1.3132617, loss 0.2381830."""
    lengths = [length - 1 for length in LENGTHS]
    scores = torch.cat([torch.full((size,), value) for size, value in zip(lengths, (1.0, 2.0, 1.0, 2.0), strict=True)])
    terms, metrics = ORPO(beta=1.0).losses(Given(scores), batch_of())
    assert terms[1].item() / 2 == pytest.approx(0.2381830, abs=1e-6)
    assert float(metrics["reward_margin"][0]) / 2 == pytest.approx(1.3132617, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DPO(beta=0.0, loss="sigmoid", label_smoothing=0.0), "objective.beta must be above 0"),
        (lambda: DPO(beta=0.1, loss="ippo", label_smoothing=0.0), "objective.loss must be one of sigmoid ipo hinge"),
        (lambda: DPO(beta=0.1, loss="ipo", label_smoothing=0.1), "take objective.loss=sigmoid"),
        (lambda: DPO(beta=0.1, loss="sigmoid", label_smoothing=0.5), "in \\[0, 0.5\\)"),
        (lambda: SimPO(beta=1.0, gamma=-1.0), "objective.gamma must be 0 or more"),
        (lambda: ORPO(beta=-1.0), "objective.beta must be above 0"),
    ],
)
def test_a_value_out_of_range_is_refused(make: Callable[[], Objective], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
