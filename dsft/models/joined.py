"""Which tensors of a model are parts of one tensor in a folder of the hub, and so are written together."""

from typing import Any

import torch
from torch import nn


def joined(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name of a parameter -> the names of all that one tensor of the hub holds, for those that share one.

    Transformers cuts such a tensor when it loads a model (queries, keys and values of one matrix, say), and can only
    put together what it is given at once. model: of whole shapes, on meta. Asked for each parameter alone.
    """
    from transformers.core_model_loading import revert_weight_conversion

    whole: Any = model
    parts: dict[str, list[str]] = {}
    for name, param in model.named_parameters():
        alone = {name: torch.empty(param.shape, dtype=param.dtype, device="meta")}
        for target in revert_weight_conversion(whole, alone):
            parts.setdefault(target, []).append(name)
    return {name: tuple(names) for names in parts.values() if len(names) > 1 for name in names}
