"""Rotary embeddings whose frequencies depend on the length of an example: each of a packed row gets those of its own.

transformers takes the longest position of the whole row and keeps the frequencies of the call before, so that a long
example would change the short ones beside it and after it. Source: longrope, Ding et al. 2024, arXiv:2402.13753;
transformers' modeling_rope_utils.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsft.models.spans import UnheldError


def own_lengths(model: Any, packed: str) -> None:
    """Let model's rotary modules of type longrope or dynamic go by each example's length under the attention packed.

    Under another attention, to generate, they do as transformers does, but each call leaves them as it found them.
    Modules of other types stay untouched. Raises UnheldError for one that computes its frequencies in another way.
    """
    for module in list(model.modules()):
        types = getattr(module, "rope_type", None)
        kinds = set(types.values()) if isinstance(types, dict) else {types}
        if any(kind == "longrope" or (isinstance(kind, str) and "dynamic" in kind) for kind in kinds):
            module.forward = _Rope(module, packed).forward  # type: ignore[method-assign]


class _Rope:
    """In the place of a rotary module's forward."""

    def __init__(self, module: nn.Module, packed: str) -> None:
        self.module, self.packed = module, packed
        self.whole: Callable[..., Any] = type(module).forward
        self.plain = _undecorated(type(module))
        self.long: dict[tuple[str | None, torch.device], Tensor] = {}

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """What the module gives: tensors of (B, T, .), here for position_ids (B, T) that restart at each example."""
        module: Any = self.module
        known = {} if layer_type is None else {"layer_type": layer_type}
        if module.config._attn_implementation != self.packed:
            with _left_as_found(module):
                return self.whole(module, x, position_ids, **known)
        kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
        if kind != "longrope":  # no example is longer than the model knows, up to which dynamic changes nothing
            return self.plain(module, x, position_ids, **known)
        short = self.plain(module, x, position_ids, **known)
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        with _left_as_found(module):
            module._buffers[name] = self._long(layer_type, x)
            long = self.plain(module, x, position_ids, **known)
        beyond = lengths(position_ids) > self._original(layer_type)
        if isinstance(short, Tensor):
            return torch.where(beyond[..., None], long, short)
        return tuple(torch.where(beyond[..., None], *pair) for pair in zip(long, short, strict=True))

    def _original(self, layer_type: str | None) -> int:
        module: Any = self.module
        parameters = module.config.rope_parameters
        own = parameters if layer_type is None else parameters[layer_type]
        return int(own["original_max_position_embeddings"])

    def _long(self, layer_type: str | None, x: Tensor) -> Tensor:
        """The frequencies of an example beyond the original length, where x is; those of a real device are kept."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        key = (layer_type, x.device)
        if type(x) is Tensor and key in self.long:
            return self.long[key]
        known = {} if layer_type is None else {"layer_type": layer_type}
        length = self._original(layer_type) + 1
        made: Tensor = ROPE_INIT_FUNCTIONS["longrope"](self.module.config, x.device, seq_len=length, **known)[0]
        if type(x) is Tensor:  # not one without values, while what autograd keeps is counted
            self.long[key] = made
        return made


def lengths(positions: Tensor) -> Tensor:
    """Length of the example of each token, those before its first counted: positions (B, T) -> (B, T).

    An example goes on as long as positions count up by one. No number of it is read back from a device.
    """
    rows, tokens = positions.shape
    starts = torch.ones_like(positions)
    starts[:, 1:] = (positions[:, 1:] != positions[:, :-1] + 1).long()
    example = starts.cumsum(1) - 1
    longest = positions.new_zeros(rows, tokens).scatter_reduce(1, example, positions + 1, "amax")
    return longest.gather(1, example)


def _undecorated(kind: type) -> Callable[..., Any]:
    """The forward of a rotary module without transformers' look at the longest position."""
    forward: Any = kind.forward  # type: ignore[attr-defined]
    while hasattr(forward, "__wrapped__"):
        inner = forward.__wrapped__
        if forward.__code__.co_filename.endswith("modeling_rope_utils.py"):
            plain: Callable[..., Any] = torch.no_grad()(inner)
            return plain
        forward = inner
    raise UnheldError(
        f"model must leave the lengths of its rotary embedding to transformers, got {kind.__name__}, which does not"
    )


@contextmanager
def _left_as_found(module: nn.Module) -> Iterator[None]:
    """Put attributes and buffers of module back behind the block."""
    buffers, others = dict(module._buffers), dict(vars(module))
    values = {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}
    try:
        yield
    finally:
        for name in set(vars(module)) - set(others):
            del vars(module)[name]
        vars(module).update(others)
        module._buffers.clear()
        module._buffers.update(buffers)
        for name, value in values.items():
            buffers[name].copy_(value)  # type: ignore[union-attr]  # 5.23 changes them in place
