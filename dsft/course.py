"""The contract of what a method does around each optimizer step of a run: a penalty, new values, state of its own."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")

KEPT = "method/"
"""Beginning of the names that a course's state has in a checkpoint."""


class Course:
    """Made once per run. All tensors that it is given are whole, fp32 and the same on every rank.

    So must its answers be: it draws no random number and asks no rank. names: the parameters that it is shown, all of
    which learn; state: what a resumed run needs, changed in place and in after or after_step alone.
    """

    names: tuple[str, ...]
    state: dict[str, Tensor]

    @property
    def parts(self) -> Sequence[Sequence[str]]:
        """The names that it is shown together: each part is gathered in one collective, and freed before the next."""
        return (self.names,)

    def begin_step(self, step: int) -> None:
        """The forward passes that follow, of all micro-batches of this rank, are those of step."""

    def before(self, step: int) -> Iterable[Sequence[str]]:
        """Names to show penalty before the move of step, part by part; empty: it is not asked."""
        return self.parts

    def penalty(self, values: Mapping[str, Tensor]) -> Tensor | None:
        """What is added to the mean loss for a part, once per optimizer step; values are leaves of autograd."""
        return None

    def wants_gradients(self, step: int) -> bool:
        """True if after_step is to be given the gradients of step."""
        return False

    def after(self, step: int) -> Iterable[Sequence[str]]:
        """Names to show after_step, part by part, once step has moved; a part may come again. Empty: it is not asked.

        Not asked for a step that a NaN or Inf kept from moving.
        """
        return self.parts

    def after_step(self, step: int, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer has moved to values, a part; returns those that are to be others.

        gradients: of loss and penalty, as clipped, of all names; empty if they were not asked for.
        """
        return {}

    def news(self) -> tuple[str, Mapping[str, object]] | None:
        """An event to record, by name, and its details: once."""
        return None


def not_kept(state: Mapping[str, T]) -> dict[str, T]:
    """What of a state is the optimizer's and the parameters' own."""
    return {name: value for name, value in state.items() if not name.startswith(KEPT)}
