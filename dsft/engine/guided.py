"""The optimizer's move, and around it what the method's course asks for: a penalty's gradient, new values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsft.config import Run
from dsft.course import Course
from dsft.strategy import Strategy


@dataclass(frozen=True)
class Guided:
    """A course, and by name the parameters that it is shown, laid out as the strategy keeps them between steps."""

    course: Course
    params: dict[str, nn.Parameter]

    def values(self, strategy: Strategy, names: Sequence[str]) -> dict[str, Tensor]:
        """Whole. Collective."""
        return dict(zip(names, strategy.values([self.params[name] for name in names]), strict=True))


def guided(course: Course | None, strategy: Strategy, model: nn.Module) -> Guided | None:
    """Bind a course to the parameters of its names; its state is saved with the run from now on."""
    if course is None:
        return None
    strategy.keep(course.state)
    return Guided(course, {name: model.get_parameter(name) for name in course.names})


@torch.no_grad()
def move(around: Guided | None, run: Run, step: int, lr_scale: float) -> tuple[float, float]:
    """One update from gradients that are whole. Returns their norm before clipping and the penalty, NaN without one.

    The penalty's gradient is added after the ranks' and micro-batches' have been summed, from values that are the same
    on every rank: so it counts once, however many there are.
    """
    strategy: Strategy = run.strategy
    if around is None:
        return strategy.step(run.train.max_grad_norm, lr_scale), math.nan
    penalty = _penalize(around, strategy, step)
    gradients = {}
    if around.course.wants_gradients(step):
        gradients = dict(zip(around.params, strategy.gradients([*around.params.values()]), strict=True))
    norm = strategy.step(run.train.max_grad_norm, lr_scale)
    if math.isfinite(norm):
        clipped = min(1.0, run.train.max_grad_norm / (norm + 1e-6))  # as torch and DeepSpeed do
        for gradient in gradients.values():
            gradient.mul_(clipped)
        for names in around.course.after(step):
            if changed := around.course.after_step(step, around.values(strategy, names), gradients):
                strategy.write([around.params[name] for name in changed], [*changed.values()])
    return norm, penalty


def _penalize(around: Guided, strategy: Strategy, step: int) -> float:
    """Add the gradient of the penalty, part by part; returns its value, NaN without one. Collective."""
    penalties = []
    for names in around.course.before(step):
        leaves = {name: value.detach().requires_grad_() for name, value in around.values(strategy, names).items()}
        with torch.enable_grad():
            penalty = around.course.penalty(leaves)
        if penalty is None:
            continue
        grads = torch.autograd.grad(penalty, [*leaves.values()], allow_unused=True)
        found = [(around.params[name], grad) for name, grad in zip(names, grads, strict=True) if grad is not None]
        strategy.add_gradients([param for param, _ in found], [grad for _, grad in found])
        penalties.append(penalty.detach().double())
    return float(torch.stack(penalties).sum()) if penalties else math.nan
