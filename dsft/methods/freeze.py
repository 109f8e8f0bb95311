"""Partial fine-tuning: the top blocks, the head, the norms or parameters by name learn; the rest is frozen."""

from dataclasses import dataclass
from fnmatch import fnmatch

from torch import nn

from dsft.protocols import Anatomy, Method


@dataclass(frozen=True, kw_only=True)
class Freeze(Method):
    """trainable: any of N (the last N blocks), "head", "norms", or shell patterns of parameter names."""

    trainable: tuple[int | str, ...]

    def __post_init__(self) -> None:
        """Refuse a choice that trains nothing."""
        if not self.trainable:
            raise ValueError("method.trainable must name something, got []; e.g. method.trainable=[2,head]")
        for item in self.trainable:
            if isinstance(item, int) and item < 1:
                raise ValueError(f"method.trainable takes a number of blocks of 1 or more, got {item}")

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Freeze all, then free what trainable names; each item must match a parameter."""
        model.requires_grad_(False)
        names = [name for name, _ in model.named_parameters()]
        chosen = {name for item in self.trainable for name in _matches(item, names, anatomy)}
        for name, param in model.named_parameters():
            if name in chosen:
                param.requires_grad_(True)
        return model

    @property
    def whole(self) -> bool:
        """The result is a whole model."""
        return True


def _matches(item: int | str, names: list[str], anatomy: Anatomy) -> list[str]:
    if isinstance(item, int):
        if item > len(anatomy.blocks):
            raise ValueError(f"method.trainable must be at most {len(anatomy.blocks)} blocks, got {item}")
        prefixes = tuple(f"{block}." for block in anatomy.blocks[-item:])
        return [name for name in names if name.startswith(prefixes)]
    if item == "head":
        owner = anatomy.embedding if anatomy.tied else anatomy.head
        return [name for name in names if name.startswith(f"{owner}.")]
    if item == "norms":
        return [name for name in names if "norm" in name.rpartition(".")[0].rpartition(".")[2].lower()]
    found = [name for name in names if fnmatch(name, item)]
    if not found:
        raise ValueError(
            f"method.trainable: {item} matches no parameter; names look like {names[len(names) // 2]}, e.g. *.q_proj.*"
        )
    return found
