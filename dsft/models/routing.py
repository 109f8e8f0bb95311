"""Which experts a token goes to, decided once: a pass that is computed again takes the choices of the first.

A router chooses by torch.topk, or by the largest. Where two scores are equal but for rounding, a second pass may choose
otherwise (another kernel, another order of sums), and its gradient would be of another model than the loss, without an
error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsft.protocols import Anatomy

TOPK, MAX, ARGMAX = (torch.topk, Tensor.topk), (torch.max, Tensor.max), (torch.argmax, Tensor.argmax)
"""Functions that choose; the last two by the place of the largest."""
KEPT, SCORES = "choice.", "score."
"""Beginnings of the names of choices and their scores in a file, in the order in which the model made them."""
ROWS = 48
"""Rows of scores, the last ones of each call, that are compared between two processes."""


def routes(anatomy: Anatomy) -> bool:
    """True if a token may choose its way: the model has fused experts, or blocks with modules of a list."""
    inside = (name.removeprefix(block) for block in anatomy.blocks for name in anatomy.linears if _below(name, block))
    return bool(anatomy.experts) or any(part.isdigit() for name in inside for part in name.split("."))


def _below(name: str, block: str) -> bool:
    return name.startswith(f"{block}.")


class OtherChoicesError(Exception):
    """A process makes other calls to choose than the one whose choices it was given."""


class Choices(TorchFunctionMode):
    """Keeps the indices that each call of TOPK, MAX and ARGMAX inside of it gives, in order; later passes take those.

    kept: each (..., k) int64, on the device of the scores. The values are gathered by the indices in either case, so
    that autograd saves the same tensors in both.
    """

    functions: tuple[Any, ...] = (*TOPK, *MAX, *ARGMAX)

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.replays, self.at = False, 0

    def __enter__(self) -> Any:
        """Begin a pass."""
        self.at = 0
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End it: the next one takes its choices."""
        self.replays = True
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call func, but for what chooses, which does so once."""
        kwargs = kwargs or {}
        if func not in self.functions:
            return func(*args, **kwargs)
        if func in TOPK:
            scores, dim = args[0] if args else kwargs["input"], kwargs.get("dim", args[2] if len(args) > 2 else -1)
            indices = self._taken(scores, dim, lambda: func(*args, **kwargs).indices)
            return torch.return_types.topk((scores.gather(dim, indices), indices))
        if func in (*MAX, *ARGMAX) and isinstance(dim := kwargs.get("dim", args[1] if len(args) > 1 else None), int):
            scores, keepdim = args[0] if args else kwargs["input"], kwargs.get("keepdim", len(args) > 2 and args[2])
            indices = self._taken(scores, dim, lambda: scores.argmax(dim, keepdim=True))
            values = scores.gather(dim, indices)
            if not keepdim:
                values, indices = values.squeeze(dim), indices.squeeze(dim)
            return torch.return_types.max((values, indices)) if func in MAX else indices
        return func(*args, **kwargs)

    @torch.no_grad()
    def _taken(self, scores: Tensor, dim: int, own: Callable[[], Tensor]) -> Tensor:
        with torch._C.DisableTorchFunction():
            return self.taken(scores, dim, own)

    def taken(self, scores: Tensor, dim: int, own: Callable[[], Tensor]) -> Tensor:
        """The indices of the next call; own gives those that it chooses itself."""
        if not self.replays:
            self.kept.append(own())
        self.at += 1
        return self.kept[self.at - 1]


class Recorded(Choices):
    """Keeps the scores of the last ROWS of each topk beside its choices. scores: each (..., ROWS, E) float32."""

    functions = TOPK

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []

    def taken(self, scores: Tensor, dim: int, own: Callable[[], Tensor]) -> Tensor:
        """As in any first pass."""
        self.scores.append(scores[..., -ROWS:, :].float())
        return super().taken(scores, dim, own)

    def as_tensors(self) -> dict[str, Tensor]:
        """Choices and scores by names for a file, on CPU."""
        both = {KEPT: self.kept, SCORES: self.scores}
        return {f"{name}{at:06}": each.cpu() for name, found in both.items() for at, each in enumerate(found)}


class Compared(Choices):
    """Takes another process's choices by topk, and tells how far its scores were from those of this one.

    tensors: of Recorded, or none; they are taken out of it. Where a soft prompt stands before the tokens, its rows
    choose for themselves. off: the largest difference, relative to the largest score. Raises
    OtherChoicesError where this process makes other calls.
    """

    functions = TOPK

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.kept, self.scores = (
            [tensors.pop(name) for name in sorted(tensors) if name.startswith(start)] for start in (KEPT, SCORES)
        )
        self.replays, self.off = True, 0.0

    def taken(self, scores: Tensor, dim: int, own: Callable[[], Tensor]) -> Tensor:
        """The kept indices, behind those of a soft prompt."""
        mine = own()
        if self.at == len(self.kept):
            raise OtherChoicesError(f"it chooses more than {len(self.kept)} times")
        theirs = self.scores[self.at].to(scores.device)
        kept = super().taken(scores, dim, own).to(mine.device)
        rows = kept.shape[-2]
        seen = scores[..., -theirs.shape[-2] :, :]
        if kept.shape != mine[..., -rows:, :].shape or theirs.shape != seen.shape:
            raise OtherChoicesError(f"choice {self.at} is of shape {tuple(mine.shape)}, and was {tuple(kept.shape)}")
        known = theirs.isfinite()  # what a router leaves out has no score
        off = (seen - theirs)[known].abs().max() / theirs[known].abs().max()
        self.off = max(self.off, float(off))
        return torch.cat([mine[..., :-rows, :], kept], -2)


def decided_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """forward, which takes the choices of its first call in all later ones."""
    choices = Choices()

    def again(*args: Any, **kwargs: Any) -> Any:
        with choices:
            return forward(*args, **kwargs)

    return again
