"""Activation offload: what autograd keeps for backward waits in host memory."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from dsft.config import Train

WORTH = 2**16
"""Bytes from which a tensor is worth two copies."""


def offloaded(train: Train, device: torch.device) -> AbstractContextManager[Any]:
    """Around a forward pass: to_host, if it is asked for and there is another memory than the host's."""
    return to_host() if train.offload_activations and device.type != "cpu" else nullcontext()


def to_host() -> saved_tensors_hooks:
    """Tensors saved within are copied to pinned memory, and back when backward asks for them; parameters stay."""
    library = save_on_cpu(pin_memory=True)

    def pack(tensor: Tensor) -> Any:
        owner = tensor if tensor._base is None else tensor._base
        stays = isinstance(owner, nn.Parameter) or tensor.nbytes < WORTH
        return tensor if stays else library.pack_hook(tensor)

    def unpack(kept: Any) -> Tensor:
        there: Tensor = kept if isinstance(kept, Tensor) else library.unpack_hook(kept)
        return there

    return saved_tensors_hooks(pack, unpack)
