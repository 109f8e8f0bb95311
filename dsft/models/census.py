"""Parameters of a model counted by role, as the numbers that they stand for and not as the bytes that hold them."""

import math
from typing import Any

from torch import nn

from dsft.packed import packed_weights
from dsft.protocols import Anatomy


def census(model: nn.Module, anatomy: Anatomy) -> dict[str, Any]:
    """{"total", "trainable", "by_role": {role: {"total", "trainable"}}}; the model may be on meta.

    A packed weight counts as its numbers. Roles: embedding, head, experts, norm and those of linears; an adapter's
    parameters count under the role of what they adapt.
    """
    roles: dict[str, dict[str, int]] = {}
    for name, count, trainable in _counted(model):
        part = roles.setdefault(_role(name, anatomy), {"total": 0, "trainable": 0})
        part["total"] += count
        part["trainable"] += count if trainable else 0
    return {
        "total": sum(part["total"] for part in roles.values()),
        "trainable": sum(part["trainable"] for part in roles.values()),
        "by_role": roles,
    }


def _counted(model: nn.Module) -> list[tuple[str, int, bool]]:
    counted, seen = [], set[int]()
    for path, module in model.named_modules():
        for key, weight in packed_weights(module).items():
            counted.append((f"{path}.{key}", math.prod(weight.shape), False))
            seen |= {id(module.get_parameter(part)) for part in weight.parts}
        for key, param in module.named_parameters(recurse=False):
            if id(param) not in seen:
                counted.append((f"{path}.{key}", param.numel(), param.requires_grad))
            seen.add(id(param))
    return counted


def _role(name: str, anatomy: Anatomy) -> str:
    if name.startswith(f"{anatomy.embedding}."):
        return "embedding"
    if name.startswith(f"{anatomy.head}."):
        return "head"
    if any(name.startswith(f"{expert}.") for expert in anatomy.experts):
        return "experts"
    for linear, role in anatomy.linears.items():
        if name.startswith(f"{linear}."):
            return role
    if "norm" in name.lower():
        return "norm"
    owner = name.rpartition(".")[0].rpartition(".")[0]
    experts = [name for name in anatomy.experts if "expert" in name.rpartition(".")[2].lower()]
    routes = any(name.rpartition(".")[0] == owner for name in experts) and owner not in anatomy.blocks
    return "router" if routes else "other"
