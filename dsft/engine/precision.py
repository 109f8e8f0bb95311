"""The precision of forward passes."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""By value of train.precision: how frozen weights are kept."""


def cast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward pass under train.precision=precision."""
    # no cache: the bf16 copies of all that trains would otherwise live until the end of backward
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
