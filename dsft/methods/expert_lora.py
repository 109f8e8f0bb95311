"""LoRA on fused experts: two thin stacks beside each stack of weights, and the layout that PEFT has for them in files.

PEFT 0.21 keeps A as (E r, in), expert after expert, and B as (out, r E), whose columns are rank after rank with the
experts inside; the layer of the stack that its module registers last is the outermost, and each other one is inside of
the next (base_layer).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from dsft import grouped
from dsft.grouped import BESIDE, Routes
from dsft.moved import stack
from dsft.packed import stacked
from dsft.protocols import Anatomy

WORD = "experts"
"""Word of method.target_modules for every stack of every fused expert."""

BASE = "base_model.model."


class ExpertLora(nn.Module):
    """s B_e A_e x beside a stack's W_e x; A (E, r, in), B (E, out, r), fp32."""

    multiplies_stacks = True

    def __init__(self, sides: tuple[int, int, int], rank: int, scale: float) -> None:
        """sides: E, out, in of the stack."""
        super().__init__()
        experts, out, inside = sides
        self.A = nn.Parameter(torch.empty(experts, rank, inside, device="meta"))
        self.B = nn.Parameter(torch.empty(experts, out, rank, device="meta"))
        self.rank, self.scale = rank, scale

    def forward(self, y: Tensor, rows: Tensor, routes: Routes) -> Tensor:
        """Base's product y (S, out) and its rows (S, in), sorted by expert -> their sum with the adapter's product."""
        hidden = grouped.product(rows, stack(self, "A"), routes.ends)
        return torch.add(y, grouped.product(hidden, stack(self, "B"), routes.ends).to(y.dtype), alpha=self.scale)


def stacks(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Full names of the stacks of weights of all fused experts, in the order of their modules.

    Raises ValueError if there are none, or if a class does not compute them through transformers' interface.
    """
    kind: Any = model.config
    if not anatomy.experts:
        raise ValueError(
            f"method.target_modules: {WORD} matches nothing, as a {kind.model_type} model has no experts that are "
            "stacks of three dimensions; leave it out (attention is possible)"
        )
    found = []
    routed = [name for name in anatomy.experts if hasattr(model.get_submodule(name), "has_gate")]
    for name in routed or anatomy.experts:
        module = model.get_submodule(name)
        if not grouped.computes(module):
            raise ValueError(
                f"method.target_modules must not name {WORD} in a {kind.model_type} model: {type(module).__name__} "
                "does not compute them through transformers' interface for experts; take "
                "method.target_modules=attention"
            )
        found += [f"{name}.{key}" for key in stacked(module)]
    return found


def sides(model: nn.Module, stack: str) -> tuple[int, int, int]:
    """E, out, in of a stack, whichever way its class keeps it."""
    name, _, key = stack.rpartition(".")
    module: Any = model.get_submodule(name)
    experts, one, other = stacked(module)[key]
    return (experts, other, one) if module.is_transposed else (experts, one, other)


def add(model: nn.Module, stack: str, rank: int, scale: float) -> None:
    """Put an adapter beside a stack; it learns."""
    name, _, key = stack.rpartition(".")
    model.get_submodule(name).register_module(f"{BESIDE}{key}", ExpertLora(sides(model, stack), rank, scale))


def adapted(model: nn.Module) -> Iterator[tuple[str, str, ExpertLora]]:
    """(name of the module of experts, key of the stack, adapter) of each adapter in model."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertLora):
            experts, _, leaf = name.rpartition(".")
            yield experts, leaf.removeprefix(BESIDE), module


def initial(name: str, param: Tensor) -> Tensor | None:
    """First value of an adapter's parameter, None if it is another's: that of PEFT, as for a linear."""
    factor = _factor(name)
    if factor is None:
        return None
    value = torch.zeros(param.shape, dtype=torch.float32)
    return value.uniform_(-1 / math.sqrt(param.shape[2]), 1 / math.sqrt(param.shape[2])) if factor == "A" else value


def in_file(model: nn.Module) -> dict[str, str]:
    """Name of each adapter's parameter -> its name in PEFT's file."""
    found, inside = dict[str, str](), dict[str, list[str]]()
    for experts, key, _ in adapted(model):
        inside.setdefault(experts, []).append(key)
    for experts, keys in inside.items():
        order = [key for key in stacked(model.get_submodule(experts)) if key in keys]
        for depth, key in enumerate(reversed(order)):
            layer = f"{BASE}{experts}.{'base_layer.' * depth}"
            found |= {f"{experts}.{BESIDE}{key}.{factor}": f"{layer}lora_{factor}.weight" for factor in "AB"}
    return found


def to_file(name: str, value: Tensor) -> Tensor:
    """Value (E, r, in) or (E, out, r) of the parameter called name, as PEFT's file has it."""
    return value.flatten(0, 1) if _factor(name) == "A" else value.permute(1, 2, 0).flatten(1)


def from_file(name: str, value: Tensor, experts: int) -> Tensor:
    """Return what to_file was given."""
    if _factor(name) == "A":
        return value.reshape(experts, -1, value.shape[1])
    return value.reshape(len(value), -1, experts).permute(2, 0, 1).contiguous()


def shape_in_file(name: str, param: Tensor) -> torch.Size:
    """Shape of what to_file gives."""
    return to_file(name, torch.empty(param.shape, device="meta")).shape


def target_parameters(model: nn.Module) -> list[str]:
    """The names of PEFT's configuration that mean all adapted stacks and no others."""
    full = {f"{experts}.{key}" for experts, key, _ in adapted(model)}
    ends = {".".join(name.split(".")[-2:]) for name in full}
    names = {name for name, _ in model.named_parameters()} | full  # a packed stack is no parameter
    meant = {name for name in names if any(name.endswith(f".{end}") for end in ends)}
    return sorted(ends if meant == full else full)


def portable(config: Any, model: nn.Module) -> Any:
    """PEFT's configuration with the adapters of experts in it: their stacks, and their rank where it is another."""
    ranks = {f"{experts}.{key}": module.rank for experts, key, module in adapted(model)}
    if not ranks:
        return config
    config = deepcopy(config)
    names = target_parameters(model)
    config.target_parameters = sorted({*(config.target_parameters or ()), *names})
    told = config.rank_pattern
    rest = {name: rank for name, rank in ranks.items() if not any(re.match(rf"(.*\.)?({key})$", name) for key in told)}
    of_rest = {end: rank for end in names for name, rank in rest.items() if f".{name}".endswith(f".{end}")}
    config.rank_pattern = {**told, **{end: rank for end, rank in of_rest.items() if rank != config.r}}
    return config


def check_ranks(model: nn.Module, there: Mapping[str, Sequence[int]]) -> None:
    """Refuse a file, of which shapes are there, whose experts all have one rank, and those of model another one."""
    places, modules = in_file(model), {f"{experts}.{BESIDE}{key}": module for experts, key, module in adapted(model)}
    pairs = set[tuple[int, int]]()
    for name, place in places.items():
        module = modules[name.rpartition(".")[0]]
        if _factor(name) == "A" and place in there:
            pairs.add((module.rank, there[place][0] // module.A.shape[0]))
    if len(pairs) == 1 and len(set(*pairs)) > 1:
        ((mine, other),) = pairs
        raise ValueError(
            f"method.init_from must agree in the rank of experts, {mine}, got {other}; set method.expert_rank={other}"
        )


def is_second(name: str) -> bool:
    """True if name is that of an adapter's B."""
    return _factor(name) == "B"


def _factor(name: str) -> str | None:
    """A or B of an adapter's parameter, None of another one."""
    *_, leaf, factor = "..", *name.split(".")
    return factor if leaf.startswith(BESIDE) and factor in ("A", "B") else None
