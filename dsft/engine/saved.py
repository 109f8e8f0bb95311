"""What autograd keeps of a forward pass, counted on fake tensors: no memory, each kind of block once."""

import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dsft.packed import PackedStack, packed_weights
from dsft.protocols import Anatomy


@dataclass(frozen=True)
class Saved:
    """Bytes kept for backward. blocks: of each block, all that it keeps; inputs: its input alone; rest: elsewhere."""

    blocks: tuple[int, ...]
    inputs: tuple[int, ...]
    rest: int


def count_saved(model: nn.Module, anatomy: Anatomy, lengths: tuple[int, ...], *, bf16: bool) -> Saved | None:
    """What a forward pass of model (on meta) over examples of these lengths keeps, every token supervised.

    Parameters are not counted. None if the pass depends on its data (some ways to choose experts) or cannot be faked.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.disabled, was = True, log.disabled  # it prints what it raises
    try:
        with FakeTensorMode():
            fake = cache(_fake)  # those alike may be one: nothing is computed, nothing of them counted
            held = {name: fake(tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in _named(model)}
            counter = _Counter()
            with _counted_blocks(model, anatomy, counter), _shapes_for_bytes(model):
                with (
                    torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False),
                    saved_tensors_hooks(counter.keep, lambda kept: kept.tensor),
                ):
                    output = torch.func.functional_call(model, held, kwargs=_call(lengths))
            bytes_of = counter.bytes_of(held.values())
            del output  # until here it held what backward would need
    except Exception:  # whatever a model's own code, or torch's, can raise over tensors without values
        return None
    finally:
        log.disabled = was
    return Saved(tuple(bytes_of[kind] for kind in counter.kinds), tuple(counter.inputs), bytes_of[""])


class _Kept:
    """A tensor that autograd saved; gone when autograd lets go of it. where: a kind of block, or "" outside of all."""

    def __init__(self, tensor: Tensor, where: Any) -> None:
        self.tensor, self.where = tensor, where


class _Counter:
    """What is saved, by where."""

    def __init__(self) -> None:
        self.where: Any = ""
        self.kept: list[weakref.ref[_Kept]] = []
        self.outputs: dict[Any, Any] = {}
        self.kinds: list[Any] = []
        self.inputs: list[int] = []

    def keep(self, tensor: Tensor) -> _Kept:
        """Autograd saves tensor."""
        kept = _Kept(tensor, self.where)
        self.kept.append(weakref.ref(kept))
        return kept

    def bytes_of(self, held: Iterable[Tensor]) -> dict[Any, int]:
        """Kind -> bytes of what is still kept, each storage once; held: what does not count."""
        seen = {tensor.untyped_storage()._cdata for tensor in held}
        sizes = dict.fromkeys(("", *self.outputs), 0)
        for kept in filter(None, (kept() for kept in self.kept)):
            storage = kept.tensor.untyped_storage()
            sizes[kept.where] += 0 if storage._cdata in seen else storage.nbytes()
            seen.add(storage._cdata)
        return sizes

    def block(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """The block's output; computed for the first of its kind, else what that one gave."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        parts = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters())
        kind = (type(module), parts, hidden.requires_grad)
        if kind not in self.outputs:
            self.where = kind
            self.outputs[kind] = forward(*args, **kwargs)
            self.where = ""
        self.kinds.append(kind)
        self.inputs.append(hidden.nbytes)
        return self.outputs[kind]


@contextmanager
def _counted_blocks(model: nn.Module, anatomy: Anatomy, counter: _Counter) -> Iterator[None]:
    blocks = [model.get_submodule(name) for name in anatomy.blocks]

    def through(module: nn.Module, forward: Any) -> Any:
        return lambda *args, **kwargs: counter.block(module, forward, args, kwargs)

    for module in blocks:
        module.forward = through(module, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in blocks:
            del module.forward


@contextmanager
def _shapes_for_bytes(model: nn.Module) -> Iterator[None]:
    """Within: bytes decode to a weight without values, all experts of a stack at once: nobody knows where rows end."""
    packed = [weight for module in model.modules() for weight in packed_weights(module).values()]
    codecs = {id(weight.codec): weight.codec for weight in packed}.values()
    stacks = {weight: weight.at_once for weight in packed if isinstance(weight, PackedStack)}
    for codec in codecs:
        codec.decode = lambda parts, sides, dtype: torch.empty(sides, dtype=dtype)  # type: ignore[method-assign]
    for stack in stacks:
        stack.at_once = stack.shape[0]
    try:
        yield
    finally:
        for codec in codecs:
            del codec.decode
        for stack, at_once in stacks.items():
            stack.at_once = at_once


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _fake(shape: torch.Size, dtype: torch.dtype, learns: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype).requires_grad_(learns)


def _call(lengths: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of a model's forward pass: examples laid end to end, as objectives give them."""
    tokens = sum(lengths)
    row = torch.zeros(1, tokens, dtype=torch.int64)
    return {
        "input_ids": row,
        "position_ids": row,
        "segment_lengths": lengths,
        "logits_to_keep": row[0],
        "targets": row[0],
        "use_cache": False,
    }
