"""Scores and gradients of a few examples, by a model's class as transformers calls it, and as dsft calls it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Found:
    """The scores (T,) that a model gives each example, and the gradient of their sum by parameter."""

    scores: list[Tensor]
    grads: dict[str, Tensor]


def one_by_one(model: Any, examples: Sequence[Tensor]) -> Found:
    """Scores and gradient by the class itself, called as transformers calls it."""
    model.zero_grad()
    scores = []
    for example in examples:
        logits = model(input_ids=example[None], use_cache=False).logits[0, :-1].float()
        scores.append(F.cross_entropy(logits, example[1:], reduction="none"))
    return _with_gradient(model, scores)


@torch.no_grad()
def evaluated(model: Any, example: Tensor) -> Tensor:
    """Logits (T, V) of one example by the class itself in evaluation, where some take another path than in training."""
    model.eval()
    logits: Tensor = model(input_ids=example[None], use_cache=False).logits[0]
    model.train()
    return logits


def scored(model: Any, examples: Sequence[Tensor], *, packed: bool) -> Found:
    """Scores and gradient as dsft calls the model: in one row, or a row each."""
    model.zero_grad()
    if packed:
        return _with_gradient(model, list(_row(model, examples)))
    return _with_gradient(model, [next(_row(model, [example])) for example in examples])


def _row(model: Any, examples: Sequence[Tensor]) -> Iterator[Tensor]:
    lengths = tuple(map(len, examples))
    ends = torch.tensor(lengths).cumsum(0) - 1
    kept = torch.ones(sum(lengths), dtype=torch.bool)
    kept[ends] = False
    scores = model(
        input_ids=torch.cat(list(examples))[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        segment_lengths=lengths,
        logits_to_keep=kept.nonzero().flatten(),
        targets=torch.cat([example[1:] for example in examples]),
        use_cache=False,
    ).logits[0]
    yield from scores.split([length - 1 for length in lengths])


def _with_gradient(model: nn.Module, scores: list[Tensor]) -> Found:
    torch.cat(scores).sum().backward()  # type: ignore[no-untyped-call]
    grads = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    return Found([each.detach() for each in scores], grads)


def off(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest value; infinite where a value is not finite."""
    one, other = torch.cat(list(mine)), torch.cat(list(theirs))
    off = float((one - other).abs().max() / other.abs().max())
    return off if off == off else float("inf")  # NaN


def apart(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients, relative to the norm of the second."""
    zero = torch.zeros(())
    names = mine.keys() | theirs.keys()
    difference = sum(float((mine.get(name, zero) - theirs.get(name, zero)).square().sum()) for name in names)
    return float((difference / sum(float(grad.square().sum()) for grad in theirs.values())) ** 0.5)
