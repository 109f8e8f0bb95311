"""Count which share of a model is packed, and of which bytes its memory consists; refuse less than was promised."""

import math
from dataclasses import dataclass

from torch import nn

from dsft.grouped import BESIDE
from dsft.packed import packed_weights
from dsft.protocols import Anatomy

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LEAST = 0.9
"""Share of the blocks' matrices that a quantization must pack: the rest are convolutions, gates and routers."""


@dataclass(frozen=True)
class Footprint:
    """How a model's memory divides: parameters as the model counts them, bytes as they are stored.

    packed: kept as bytes, without biases; plain: all others; experts: those of plain that are fused (E, ., .), without
    an adapter's.
    """

    packed_parameters: int
    packed_bytes: int
    plain_parameters: int
    plain_bytes: int
    expert_parameters: int

    def __str__(self) -> str:
        """Return one line for the terminal."""
        total = max(1, self.packed_parameters + self.plain_parameters)
        size = self.packed_bytes + self.plain_bytes
        shown = f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
        line = (
            f"{self.packed_parameters / total:.1%} of {total:,} parameters packed, "
            f"{self.plain_parameters / total:.1%} left as they are: {shown}, "
            f"{self.plain_bytes / max(1, size):.1%} of it not packed"
        )
        if self.expert_parameters and self.packed_parameters:
            line += f"; fused experts stay unpacked ({self.expert_parameters / total:.1%} of the parameters)"
        return line


def footprint(model: nn.Module) -> Footprint:
    """Count what is packed in model and what is not, on meta too, before sharding. Tied parameters count once."""
    packed_parameters = packed_bytes = 0
    inside: set[int] = set()
    for module in model.modules():
        for weight in packed_weights(module).values():
            parts = [module.get_parameter(name) for name in weight.parts]
            packed_parameters += math.prod(weight.shape)
            packed_bytes += sum(part.numel() for part in parts)
            inside.update(id(part) for part in parts)
    plain = [param for param in model.parameters() if id(param) not in inside]
    own = [
        module for name, module in model.named_modules()
        if not name.rpartition(".")[2].startswith(BESIDE) and not isinstance(module, CONVOLUTIONS)
    ]  # fmt: skip
    stacks = {id(param): param for module in own for param in module.parameters(recurse=False) if param.ndim == 3}
    return Footprint(
        packed_parameters=packed_parameters,
        packed_bytes=packed_bytes,
        plain_parameters=sum(param.numel() for param in plain),
        plain_bytes=sum(param.numel() * param.element_size() for param in plain),
        expert_parameters=sum(param.numel() for param in stacks.values()),
    )


def require_packed(model: nn.Module, anatomy: Anatomy, name: str, *, experts: bool) -> None:
    """Refuse a base of whose matrices less is packed than the name of a quantization promises.

    model: converted, before a method adds to it. experts: stacks of experts were promised too. Raises ValueError.
    """
    packed, rest = 0, dict[str, tuple[int, str]]()
    for block in anatomy.blocks:
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            packed += sum(math.prod(weight.shape) for weight in packed_weights(module).values())
            for key, param in module.named_parameters(recurse=False):
                matrix = param.is_floating_point() and param.ndim > 1
                if matrix and (experts or not _is_of_experts(path, anatomy)):
                    rest[f"{path}.{key}"] = (param.numel(), type(module).__name__)
    whole = packed + sum(count for count, _ in rest.values())
    if packed >= LEAST * whole:
        return
    largest = max(rest, key=lambda path: rest[path][0])
    _, kind = rest[largest]
    fused = _is_of_experts(largest.rpartition(".")[0], anatomy)
    why = "computes its experts in its own way" if fused else "is no nn.Linear"
    raise ValueError(
        f"quantization={name} must pack {LEAST:.0%} of the matrices of the blocks or more, got {packed / whole:.1%} in "
        f"{type(model).__name__}: {largest} stays as it is, as {kind} {why}; take "
        f"{'quantization.experts=false, which leaves experts, or ' if fused else ''}quantization=none"
    )


def _is_of_experts(path: str, anatomy: Anatomy) -> bool:
    """True for a module of fused experts, of three dimensions or, as in DBRX, of two."""
    return path in anatomy.experts or "experts" in path.split(".")
