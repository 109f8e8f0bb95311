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
    """True if tokens choose their way through a block: it has fused experts, or linears of experts or routers."""
    return bool(anatomy.experts) or any("expert" in name or "router" in name for name in anatomy.linears)


class OtherChoicesError(Exception):
    """A process makes other calls to choose than the one whose choices it was given."""


class Choices(TorchFunctionMode):
    """Keeps the indices that each call of TOPK, MAX and ARGMAX inside of it gives, in order; later passes take those.

    kept: each (..., k), int16 where they fit, on the device of the scores. The values are gathered by the indices in
    either case, so that autograd saves the same tensors in both.
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
        if func not in self.functions or "out" in kwargs:
            return func(*args, **kwargs)
        if func in TOPK:
            scores, dim = args[0] if args else kwargs["input"], kwargs.get("dim", args[2] if len(args) > 2 else -1)
            indices = self._taken(scores, dim, lambda: func(*args, **kwargs).indices)
            return torch.return_types.topk((scores.gather(dim, indices), indices))
        if isinstance(dim := kwargs.get("dim", args[1] if len(args) > 1 else None), int):
            scores, keepdim = args[0] if args else kwargs["input"], kwargs.get("keepdim", len(args) > 2 and args[2])
            indices = self._taken(scores, dim, lambda: scores.max(dim, keepdim=True).indices)
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
            fits = scores.shape[dim] <= torch.iinfo(torch.int16).max
            self.kept.append(own().to(torch.int16 if fits else torch.int32))
        self.at += 1
        return self.kept[self.at - 1].long()


class Recorded(Choices):
    """Keeps the scores of the last ROWS of each topk beside its choices. scores: each (..., ROWS, E) float32.

    What is chosen along another dimension than the last, or in a vector, is not kept, here and in Compared.
    """

    functions = TOPK

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []

    def taken(self, scores: Tensor, dim: int, own: Callable[[], Tensor]) -> Tensor:
        """Keep the scores, then the indices."""
        if not _in_rows(scores, dim):
            return own()
        self.scores.append(scores[..., -ROWS:, :].float().clone())
        return super().taken(scores, dim, own)

    def as_tensors(self) -> dict[str, Tensor]:
        """Choices and scores by names for a file, on CPU."""
        both = {KEPT: self.kept, SCORES: self.scores}
        return {f"{name}{at:06}": each.cpu() for name, found in both.items() for at, each in enumerate(found)}


class Compared(Choices):
    """Takes another process's choices by topk, and tells how far its scores were from those of this one.

    tensors: of Recorded, or none; they are taken out of it. off: the largest difference in the first pass, moved: that
    of any later pass from the first, both relative to the largest score. Raises OtherChoicesError where this process
    makes other calls.
    """

    functions = TOPK

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.kept, self.scores = (
            [tensors.pop(name) for name in sorted(tensors) if name.startswith(start)] for start in (KEPT, SCORES)
        )
        self.replays, self.off, self.moved = True, 0.0, 0.0
        self.first: list[Tensor] = []

    def __exit__(self, *error: Any) -> None:
        """Require as many calls as there were."""
        super().__exit__(*error)
        if error[0] is None and self.at < len(self.kept):
            raise OtherChoicesError(f"it chooses {self.at} times, and chose {len(self.kept)} times")

    def taken(self, scores: Tensor, dim: int, own: Callable[[], Tensor]) -> Tensor:
        """Compare the scores, and return the kept indices."""
        if not _in_rows(scores, dim):
            return own()
        mine, seen, at = own(), scores[..., -ROWS:, :].float(), self.at
        if at == len(self.kept):
            raise OtherChoicesError(f"it chooses more than {at} times")
        kept, theirs = super().taken(scores, dim, own).to(mine.device), self.scores[at].to(mine.device)
        if (kept.shape, theirs.shape) != (mine.shape, seen.shape):
            raise OtherChoicesError(f"choice {at + 1} is of shape {tuple(mine.shape)}, and was {tuple(kept.shape)}")
        if at == len(self.first):
            self.first.append(seen.clone())
            self.off = max(self.off, _apart(seen, theirs))
        else:
            self.moved = max(self.moved, _apart(seen, self.first[at]))
        return kept


def _in_rows(scores: Tensor, dim: int) -> bool:
    return scores.ndim > 1 and dim % scores.ndim == scores.ndim - 1


def _apart(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest of theirs; infinite where mine is no number."""
    known = theirs.isfinite()  # what a router leaves out has no score
    if not bool(known.any()):
        return 0.0
    off = float((mine - theirs)[known].abs().max() / theirs[known].abs().max().clamp(min=1e-30))
    return off if off == off else float("inf")


def decided_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """forward, which takes the choices of its first call in all later ones."""
    choices = Choices()

    def again(*args: Any, **kwargs: Any) -> Any:
        with choices:
            return forward(*args, **kwargs)

    return again
