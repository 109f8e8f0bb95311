"""Running parts of a model on meta while what is between them has values: zeros, and positions as they are."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Mixed(TorchFunctionMode):
    """What meets a tensor on meta goes to meta; outside of the model's parts the result is zeros on CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0

    def inside(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a part of the model on meta, but for whole numbers: positions keep their values until they meet it."""
        self.depth += 1
        try:
            return self._left(forward(*_mapped(args, _floats_to_meta), **_mapped(kwargs, _floats_to_meta)), depth=1)
        finally:
            self.depth -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call func with all of its tensors on one device."""
        kwargs = kwargs or {}
        if not any(part.is_meta for part in tensors((args, kwargs))):
            return func(*args, **kwargs)
        if func is Tensor.cpu:
            return self._left(args[0], depth=0)
        result = func(*_mapped(args, _to_meta, places=True), **_mapped(kwargs, _to_meta, places=True))
        return self._left(result, depth=0)

    def _left(self, value: Any, *, depth: int) -> Any:
        return _mapped(value, _zeros) if self.depth == depth else value


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def _mapped(value: Any, change: Callable[[Tensor], Tensor], *, places: bool = False) -> Any:
    """Value with each tensor changed, in tuples, lists and dictionaries; places: devices become meta."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(part, change, places=places) for part in value)
    if type(value) is dict:
        return {name: _mapped(part, change, places=places) for name, part in value.items()}
    if places and (isinstance(value, torch.device) or value == "cpu"):
        return torch.device("meta")
    return value


def _to_meta(part: Tensor) -> Tensor:
    return part if part.is_meta else part.to("meta")


def _floats_to_meta(part: Tensor) -> Tensor:
    return _to_meta(part) if part.is_floating_point() or part.is_complex() else part


def _zeros(part: Tensor) -> Tensor:
    """Zeros on CPU in place of a tensor without values; one of a class of its own stays as it is."""
    return torch.zeros(part.shape, dtype=part.dtype) if part.is_meta and type(part) is Tensor else part
