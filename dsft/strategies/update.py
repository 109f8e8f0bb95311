"""One optimizer step on this process's parameters or shards: global norm, clipping, rate, move."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsft.protocols import OptimizerFactory


class Update:
    """The optimizer of a run, and the parameters that it moves."""

    def __init__(self, groups: Sequence[dict[str, Any]], make_optimizer: OptimizerFactory) -> None:
        self.optimizer = make_optimizer(groups)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.params: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, max_norm: float, lr_scale: float) -> float:
        """Clip the gradients to max_norm, move, forget them. Returns the norm before clipping.

        If it is not finite, nothing moves. Gradients must be whole: summed over ranks, or sharded as DTensors.
        """
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        total = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if math.isfinite(total):
            torch.nn.utils.clip_grads_with_norm_(self.params, max_norm, norm)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * lr_scale
            self.optimizer.step()
        self.drop()
        return total

    def drop(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


def whole(param: Tensor) -> Tensor:
    """The whole parameter on CPU; gathers a DTensor (collective)."""
    value = param.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
