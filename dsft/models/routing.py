"""Which experts a token goes to, decided once: a pass that is computed again takes the choices of the first.

A router chooses by torch.topk. Where two scores are equal but for rounding, a second pass may choose otherwise (another
kernel, another order of sums), and its gradient would be of another model than the loss, without an error.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsft.protocols import Anatomy

CHOOSE = (torch.topk, Tensor.topk)
CHOICE = "choice."
"""Beginning of the names of choices in the probe of a result, in the order in which the model made them."""


def routes(anatomy: Anatomy) -> bool:
    """True if a token may choose its way: the model has fused experts, or blocks with modules of a list."""
    inside = (name.removeprefix(block) for block in anatomy.blocks for name in anatomy.linears if _below(name, block))
    return bool(anatomy.experts) or any(part.isdigit() for name in inside for part in name.split("."))


def _below(name: str, block: str) -> bool:
    return name.startswith(f"{block}.")


class Choices(TorchFunctionMode):
    """Keeps the indices of each call of topk inside of it, in order; inside of it again, they are taken in their place.

    kept: from an earlier pass, each (..., k) int64, on the device of the scores. The values are gathered by the indices
    in either case, so that autograd saves the same tensors in both.
    """

    def __init__(self, kept: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.kept, self.replays, self.at = list(kept or ()), kept is not None, 0

    def __enter__(self) -> Any:
        """Begin a pass."""
        self.at = 0
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End it: the next one takes its choices."""
        self.replays = True
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call func, but for topk, which chooses once."""
        kwargs = kwargs or {}
        if func not in CHOOSE:
            return func(*args, **kwargs)
        scores, dim = args[0] if args else kwargs["input"], kwargs.get("dim", args[2] if len(args) > 2 else -1)
        with torch.no_grad():
            indices = self.taken(scores, dim, lambda: func(*args, **kwargs).indices)
        return torch.return_types.topk((scores.gather(dim, indices), indices))

    def taken(self, scores: Tensor, dim: int, own: Callable[[], Tensor]) -> Tensor:
        """The indices of the next call; own gives those that it chooses itself."""
        if not self.replays:
            self.kept.append(own())
        self.at += 1
        return self.kept[self.at - 1]


class Compared(Choices):
    """Takes the choices of another process, and tells how far they are from those that this one would make.

    Where a soft prompt stands before the tokens, its rows choose for themselves. short: the most by which a score that
    was chosen there is below the least that is chosen here, relative to the largest score. Raises ValueError where this
    process makes other calls.
    """

    def __init__(self, kept: Sequence[Tensor]) -> None:
        super().__init__(kept)
        self.short = 0.0

    def taken(self, scores: Tensor, dim: int, own: Callable[[], Tensor]) -> Tensor:
        """The kept indices, behind those of a soft prompt."""
        mine = own()
        if self.at == len(self.kept):
            raise ValueError(f"it chooses more than {len(self.kept)} times")
        kept = super().taken(scores, dim, own).to(mine.device)
        rows = kept.shape[-2]
        if kept.shape != mine[..., -rows:, :].shape:
            raise ValueError(f"choice {self.at} is of shape {tuple(mine.shape)}, and was {tuple(kept.shape)}")
        kept = torch.cat([mine[..., :-rows, :], kept], -2)
        least, theirs = scores.gather(dim, mine).amin(dim, keepdim=True), scores.gather(dim, kept)
        largest = scores.where(scores.isfinite(), 0).abs().max()
        self.short = max(self.short, float(((least - theirs) / largest).max()))
        return kept


def decided_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """forward, which takes the choices of its first call in all later ones."""
    choices = Choices()

    def again(*args: Any, **kwargs: Any) -> Any:
        with choices:
            return forward(*args, **kwargs)

    return again
