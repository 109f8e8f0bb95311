"""Dropout that no rank, micro-batch, packing or recomputation changes: each example brings its own masks.

A mask is a function of (train.seed, step, the example and its place in the step, module, position, feature). In place
of nn.Dropout in the base and in adapters alike; calls of torch's own function are taken up while a model runs that may
make some.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from dsft_launchers.verdict import RefusedError
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from dsft.comm.devices import sent
from dsft.engine.masks import HALF, columns_of, halves, kept, rows_of, stream, threshold
from dsft.objective import Batch
from dsft.protocols import Anatomy

CALLS = "functional"
"""In place of a module's name, for calls of torch's function: they are counted over the whole model."""

Forward = Callable[..., Any]


class Draws:
    """The numbers by which the masks of one model are drawn. more: positions that a method may put before each example.

    any: whether there is dropout in it. functional: why it may call torch's function for it, None if it does not.
    watched: whether a forward pass was searched for other random numbers. counts: calls of each module in this
    micro-batch.
    """

    def __init__(self, seed: int, more: int, *, modules: bool, functional: str | None) -> None:
        self.seed, self.more, self.functional = seed, more, functional
        self.any = modules or functional is not None
        self.watched = False
        self.counts: dict[str, int] = {}
        self.rows: dict[int, Tensor] = {}

    def begin(self, step: int, batch: Batch, device: torch.device) -> None:
        """The next forward pass is of this micro-batch, whose rows may stand behind those of a method."""
        if not self.any:
            return
        examples = [stream(self.seed, step, *each) for each in zip(batch.ids, batch.places, strict=True)]
        keys = torch.tensor([halves(example) for example in examples], dtype=torch.int32).T
        self.counts, self.rows = {}, {}
        for lengths in {batch.lengths, tuple(length + self.more for length in batch.lengths)}:
            positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
            found = rows_of(keys.repeat_interleave(torch.tensor(lengths), 1), positions)
            self.rows[sum(lengths)] = sent(found, device)

    def drop(self, x: Tensor, p: float, name: str) -> Tensor:
        """X with each entry 0 or as it was, over the probability to stay; x is (1, T, H) or (T, H), T all rows.

        Raises RefusedError where x is no row of all tokens: whose entry is whose could only be guessed.
        """
        number = self.counts.get(name, 0)
        self.counts[name] = number + 1
        rows = self.rows.get(x.shape[-2] if x.ndim > 1 else 0)
        if rows is None or x.ndim > 3 or (x.ndim == 3 and x.shape[0] != 1):
            if not self.rows:
                raise RuntimeError(f"{name} drops entries outside of a step: nothing says whose they are")
            raise RefusedError(
                f"model must drop entries of all tokens in their order, (1, T, H) with T = {min(self.rows)}, got "
                f"{list(x.shape)} in {name}; set its dropout to 0 (method.dropout, or config.json of the model)"
            )
        limit = threshold(p)
        if limit == HALF:
            return x * 0
        columns = _columns(name, number, x.shape[-1], x.device)
        dropped: Tensor = _Drop.apply(x, kept(rows, columns, x.shape[-1], limit), HALF / (HALF - limit))
        return dropped

    def held(self, forward: Forward) -> Forward:
        """forward, which draws the same whenever it is called: as it would at this moment."""
        if not self.any:
            return forward
        rows, counts = self.rows, dict(self.counts)

        def again(*args: Any, **kwargs: Any) -> Any:
            self.rows, self.counts = rows, dict(counts)
            with self.taking():
                return forward(*args, **kwargs)

        return again

    def taking(self) -> AbstractContextManager[object]:
        """Within it calls of torch's dropout draw here, where the model may make any."""
        return _Taking(self) if self.functional else nullcontext()


class _Drop(torch.autograd.Function):
    """x mask scale, (..., H), and the same of the gradient: no tensor of x's size but the result in either."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (x * mask).mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        return (grad * mask).mul_(ctx.scale), None, None


@lru_cache(maxsize=4096)
def _columns(name: str, number: int, width: int, device: torch.device) -> Tensor:
    return sent(columns_of(stream(name, number), width), device)


class Keyed(nn.Dropout):
    """nn.Dropout whose masks come from draws; name: its own in the model."""

    draws: Draws
    name: str
    never_compiled = True

    def forward(self, input: Tensor) -> Tensor:  # torch's name of it
        """X (1, T, H) or (T, H), as it is in evaluation."""
        return self.draws.drop(input, self.p, self.name) if self.training else input


class _Taking(TorchFunctionMode):
    """torch.nn.functional.dropout as draws would; all else as it is."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Forward, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout:
            return self._dropped(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropped(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        dropped = self.draws.drop(input, p, CALLS)
        return input.copy_(dropped) if inplace else dropped


def keyed(model: nn.Module, anatomy: Anatomy, seed: int, positions: int) -> Draws:
    """Key each nn.Dropout of model that drops, and return the numbers by which masks are drawn.

    positions: that the method puts before each example. Raises ValueError, one line, for dropout that cannot be keyed.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, _DropoutNd) and m.p > 0]
    draws = Draws(seed, positions, modules=bool(found), functional=_may_call(model))
    for name, module in found:
        if type(module) is not nn.Dropout or module.inplace:
            raise ValueError(
                f"model must drop single entries (torch's Dropout, not in place), got {type(module).__name__} in "
                f"{name}; set its probability to 0"
            )
        if _is_routed(name, anatomy):
            raise ValueError(
                f"dropout must be 0 where a module sees some tokens alone, got {module.p} in {name}, one of several "
                "experts; set method.dropout=0 or leave the experts out of method.target_modules"
            )
        module.__class__ = Keyed
        module.draws, module.name = draws, name  # type: ignore[assignment]
    return draws


def _is_routed(name: str, anatomy: Anatomy) -> bool:
    """True inside of experts that are modules of a list in a block."""
    block = next((block for block in anatomy.blocks if name.startswith(f"{block}.")), None)
    return block is not None and any(part.isdigit() for part in name.removeprefix(block).split("."))


def silence(model: Any) -> list[str]:
    """Set every probability to drop in model to 0; returns what was set, as NAME=VALUE of a module or configuration."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            found.append(f"{name}.p={module.p:g}")
            module.p = 0.0
    for holder in _holders(model):
        for key in [key for key, value in holder.items() if _drops(key, value)]:
            found.append(f"{key}={holder[key]:g}")
            holder[key] = 0.0
    return found


def _may_call(model: Any) -> str | None:
    """A probability to drop above 0 that some module or the configuration holds as a number; None if none does."""
    return next((f"{k}={v:g}" for holder in _holders(model) for k, v in holder.items() if _drops(k, v)), None)


def _drops(key: str, value: Any) -> bool:
    return "drop" in key and isinstance(value, float) and value > 0


def _holders(model: Any) -> list[dict[str, Any]]:
    """The attributes of model's configurations, and of its modules other than dropout's."""
    configs = [model.config]
    for config in configs:
        configs += [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return [*map(vars, configs), *(vars(module) for module in model.modules() if not isinstance(module, _DropoutNd))]
