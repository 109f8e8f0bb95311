"""Put packed weights in the place of a model's own: linears of the blocks, and stacks of fused experts."""

from typing import Any

import torch
from torch import nn

from dsft.packed import Codec
from dsft.protocols import Anatomy
from dsft.quantizers.packed import ByteLinear, fill
from dsft.quantizers.stacks import pack_stacks

MIB = 2**20


def convert(
    model: nn.Module, anatomy: Anatomy, name: str, codec: Codec, compute_dtype: torch.dtype | None, *, experts: bool,
    unpack_mib: int,
) -> nn.Module:  # fmt: skip
    """Pack every nn.Linear of anatomy.linears and, if experts is true, the stacks of fused experts; return the model.

    What is off meta is packed at once. Head and embedding stay; so do subclasses of nn.Linear, whose forward may
    differ, and experts that their class computes itself. name: the quantization's, for the messages.
    Raises ValueError if no linear was packed.
    """
    swapped = 0
    for path in anatomy.linears:
        linear = model.get_submodule(path)
        if type(linear) is not nn.Linear or path in (anatomy.head, anatomy.embedding):
            continue
        packed = ByteLinear(linear, codec, compute_dtype)
        if not linear.weight.is_meta:
            fill(packed, "weight", [linear.weight.detach()])
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)
        swapped += 1
    if swapped == 0:
        raise ValueError(
            f"quantization={name} must find an nn.Linear in the blocks, got none in {type(model).__name__}; "
            "choose quantization=none"
        )
    for path in anatomy.experts if experts and _exchanges_experts(model) else ():
        module = model.get_submodule(path)
        if hasattr(module, "has_gate"):  # transformers' interface for experts puts it there
            pack_stacks(module, codec, compute_dtype=compute_dtype, unpack_bytes=unpack_mib * MIB)
    return model


def check_unpack_mib(unpack_mib: int) -> None:
    """Raise ValueError for a negative number."""
    if unpack_mib < 0:
        raise ValueError(f"quantization.unpack_mib must be 0 (one expert at a time) or more, got {unpack_mib}")


def _exchanges_experts(model: Any) -> bool:
    """True if the model's experts are computed by a function that transformers lets others give."""
    asked = getattr(model, "_can_set_experts_implementation", None)
    return bool(asked and asked())
