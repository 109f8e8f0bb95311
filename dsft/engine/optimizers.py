"""Optimizers by name, and the learning rate as a function of the step."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from dsft.config import Optim
from dsft.imports import uncompiled
from dsft.strategy import OptimizerFactory

WHOLE_BELOW, BLOCK = 4096, 256
"""bitsandbytes' 8-bit optimizers keep smaller parameters' moments in fp32; of others, one fp32 scale per block."""


def factory(optim: Optim) -> OptimizerFactory:
    """Parameter groups -> optimizer. bitsandbytes' paged AdamW keeps its moments in 8 bit."""

    def make(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        parts = list(groups)
        if optim.name == "sgd":
            return torch.optim.SGD(parts, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
        if optim.name == "adafactor":
            return torch.optim.Adafactor(parts, lr=optim.lr, weight_decay=optim.weight_decay)
        adam = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
        if optim.name == "adamw":
            return torch.optim.AdamW(parts, **adam)  # type: ignore[arg-type]
        with uncompiled():
            from bitsandbytes.optim.adamw import PagedAdamW8bit

        made: torch.optim.Optimizer = PagedAdamW8bit(parts, **adam)
        return made

    return make


def state_bytes(optim: Optim, shape: torch.Size) -> int:
    """What the optimizer keeps of one fp32 parameter of this shape, beside its value and gradient."""
    count = shape.numel()
    if optim.name == "sgd":
        return 4 * count if optim.momentum else 0
    if optim.name == "adafactor":  # one mean per row and per column
        return 4 * (count // shape[-1] + count // shape[-2]) if len(shape) > 1 else 4 * count
    if optim.name == "paged_adamw8bit" and count >= WHOLE_BELOW:
        return 2 * (count + 4 * -(-count // BLOCK))
    return 8 * count


def rate(optim: Optim, step: int, total: int) -> float:
    """Share of optim.lr at step, 1 <= step <= total; never a rank or a process in it.

    Warm-up rises linearly and reaches 1 at step warmup_steps + 1. After it, with u in [0, 1] the share of the rest that
    is over: linear 1 - u, cosine (1 + cos(pi u)) / 2, wsd 1 until the last decay_steps and linear there; each of them
    ends at min_lr_ratio.
    """
    if step <= optim.warmup_steps:
        return step / (optim.warmup_steps + 1)
    if optim.schedule == "constant":
        return 1.0
    start = optim.warmup_steps
    if optim.schedule == "wsd":
        start = max(start, total - optim.decay_steps)
        if step <= start:
            return 1.0
    over = (step - 1 - start) / max(1, total - start)
    shape = (1 + math.cos(math.pi * over)) / 2 if optim.schedule == "cosine" else 1 - over
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape
