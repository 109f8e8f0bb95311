"""What makes the host wait for its device: counted while it runs, by operator and by the place that asked for it.

On a real accelerator and on a pretended one (sham_cuda.py) alike. A wait ends the host's lead: until it is over no
further kernel is launched. What is no operator is not seen: an explicit synchronize of a stream or a device.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OURS = str(Path(__file__).parents[1] / "dsft") + "/"

COUNTS_FIRST = (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "bincount", "equal", "_linalg_check_errors",
)  # fmt: skip
"""Operators whose result, or its size, the host reads back."""

BY_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_")
LOOKED_AT = frozenset(
    f"aten::{name}"
    for name in (*COUNTS_FIRST, *BY_INDEX, "repeat_interleave", "copy_", "_foreach_copy_", "_to_copy", "lift_fresh")
)


class Syncs(TorchDispatchMode):
    """Within it, each wait of this process for its device is noted in found: "PLACE: WHAT" -> how often.

    PLACE: the innermost function of dsft's on the stack, as engine/step.py train_step; "elsewhere" where there is none,
    as in a backward that autograd runs on a thread of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again in plain tensors
        out = func(*args, **(kwargs or {}))
        if func._schema.name not in LOOKED_AT:
            return out
        for what in _waits(func, args, kwargs or {}, out):
            self.found[f"{_place()}: {what}"] += 1
        return out


def _waits(func: Any, args: Any, kwargs: Any, out: Any) -> Iterator[str]:
    """What this call waits for."""
    name = func._schema.name.partition("::")[2]
    if name in ("copy_", "_foreach_copy_"):
        into, source = (part if isinstance(part, list | tuple) else [part] for part in args[:2])
        asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        yield from _copies(into, source, asynchronous=asynchronous)
    elif name == "_to_copy":
        yield from _copies([out], [args[0]], asynchronous=kwargs.get("non_blocking", False))
    elif name == "lift_fresh" and _on_device(args[0]):
        yield "number to device"  # torch.tensor(..., device=...): the copy itself hides from what listens
    elif any(map(_on_device, tree_leaves(args))) and (name in COUNTS_FIRST or _counts_first(name, args, kwargs)):
        yield name


def _counts_first(name: str, args: Any, kwargs: Any) -> bool:
    """True where it is this call's arguments that make an operator's size known on the device alone."""
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in BY_INDEX:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return False


def _copies(into: Any, source: Any, *, asynchronous: bool) -> Iterator[str]:
    """Copies between host and device that the host waits for: all but those asked for otherwise, of pinned memory."""
    for there, here in zip(into, source, strict=True):
        if there.device.type == here.device.type or "meta" in (there.device.type, here.device.type):
            continue
        host = here if there.device.type != "cpu" else there
        if not (asynchronous and host.is_pinned()):
            yield "copy to device" if host is here else "copy to host"


def _on_device(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type not in ("cpu", "meta")


def _place() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return f"{file.removeprefix(OURS)} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
