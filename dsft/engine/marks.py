"""Marks on a model's parts, which tell a profiler whose operations are inside; off again when the context is left."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import nn

from dsft.engine.parts import Part, mark
from dsft.models.work import base_linear
from dsft.packed import packed_weights
from dsft.protocols import Anatomy


@contextmanager
def marked(model: Any, anatomy: Anatomy) -> Iterator[None]:
    """Marks for as long as the context lasts; they change no number. Other threads' calls are marked too.

    The head; the base's linears; around them, and where else blocks hold linears that the base has not, the adapter;
    unpacking; attention, as transformers looks it up for each call; every wait for a collective.
    """
    from transformers import AttentionInterface

    with ExitStack() as stack:
        for module, part in _owners(model, anatomy):
            stack.enter_context(_replaced(module, "forward", part))
        packed = [weight for module in model.modules() for weight in packed_weights(module).values()]
        for codec in {id(weight.codec): weight.codec for weight in packed}.values():
            stack.enter_context(_replaced(codec, "decode", Part.UNPACKING))
        if dist.is_available():
            stack.enter_context(_replaced(dist.Work, "wait", Part.COMMUNICATION))
        name = model.config._attn_implementation
        attention = AttentionInterface()[name]
        AttentionInterface.register(name, _inside(attention, Part.ATTENTION))
        stack.callback(AttentionInterface.register, name, attention)
        yield


def _owners(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[nn.Module, Part]]:
    head = model.get_submodule(anatomy.head)
    yield head, Part.HEAD
    within = {id(module) for module in head.modules()}
    for name in anatomy.linears:
        module, base = model.get_submodule(name), base_linear(model, name)
        within |= {id(inner) for inner in module.modules()}
        yield base, Part.GEMM
        if module is not base:
            yield module, Part.ADAPTER
    for name in anatomy.blocks:
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear) and id(module) not in within:
                yield module, Part.ADAPTER


@contextmanager
def _replaced(owner: Any, name: str, part: Part) -> Iterator[None]:
    """owner.name, marked; what stood there before stands there again afterwards."""
    own = vars(owner).get(name)
    setattr(owner, name, _inside(getattr(owner, name), part))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _inside(function: Callable[..., Any], part: Part) -> Callable[..., Any]:
    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with mark(part):
            return function(*args, **kwargs)

    return inside
