"""Where in a model an adapter goes, found by structure: what ends a block's two branches, what its norms are.

A block of a decoder adds two branches to the residual stream: attention and an MLP (or experts).
"""

from functools import cache
from typing import Any

from torch import Tensor, nn

from dsft.protocols import Anatomy


def width(model: Any) -> int:
    """The size of the residual stream."""
    size: int = model.config.get_text_config().hidden_size
    return size


def branch_end(model: nn.Module, anatomy: Anatomy, block: str, role: str) -> str:
    """Name of the module whose output is what branch role ("attention", "mlp") adds to the stream.

    The branch's last linear back to the stream's width; with experts, the module around them all. Where a block names
    but one of the two, its linears of role "other" are the other one. Raises ValueError if there is no such branch.
    """
    linears = {name: kind for name, kind in anatomy.linears.items() if name.startswith(f"{block}.")}
    if role == "mlp" and _experts(anatomy, block):
        return feed_forward(model, anatomy, block)
    named = set(linears.values()) & {"attention", "mlp"}
    wanted = role if role in named else "other" if named or _experts(anatomy, block) else role
    size = width(model)
    ends = [name for name, kind in linears.items() if kind == wanted and _width_out(model, name) == size]
    if not ends:
        raise ValueError(
            f"method needs blocks whose {role} ends in an nn.Linear of the model's width, {size}, got {block} of "
            f"{type(model).__name__} without; take method=freeze or method=lora"
        )
    return ends[-1]


def feed_forward(model: nn.Module, anatomy: Anatomy, block: str) -> str:
    """Name of the block's own part that holds its MLP, experts and router included.

    Raises ValueError if that is not one module.
    """
    inside = [name for name, kind in anatomy.linears.items() if kind == "mlp" and name.startswith(f"{block}.")]
    inside += _experts(anatomy, block)
    parts = sorted({name.removeprefix(f"{block}.").partition(".")[0] for name in inside})
    owner = f"{block}.{parts[0]}" if len(parts) == 1 else None
    if owner is None or owner in inside:
        raise ValueError(
            f"method needs blocks whose MLP is one module, got {', '.join(parts) or 'none'} in {block} of "
            f"{type(model).__name__}; take method=freeze or method=lora"
        )
    return owner


def norms(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Names of the norms in the blocks and of the final one: modules called so by their class, with a weight (D,)."""
    stack = anatomy.blocks[0].rpartition(".")[0]
    home = stack.rpartition(".")[0]
    return [
        name
        for name, module in model.named_modules()
        if _is_norm(module)
        and (name.startswith(f"{stack}.") or (name.rpartition(".")[0] == home and "embed" not in name))
    ]


def grow(module: nn.Module, around: type[nn.Module]) -> None:
    """Give module the forward of around, which calls its own by super(); names, tensors and isinstance stay."""
    module.__class__ = _grown(around, type(module))  # type: ignore[arg-type]  # nn.Module types its __hash__ otherwise


@cache
def _grown(around: Any, kind: Any) -> Any:
    """One class for all modules of a kind: torch.compile makes a program for each."""
    return type(f"{around.__name__}{kind.__name__}", (around, kind), {"plain": kind})


def _experts(anatomy: Anatomy, block: str) -> list[str]:
    """Fused experts of block, and linears of experts in a list."""
    listed = [name for name, kind in anatomy.linears.items() if kind == "mlp"]
    found = [name for name in listed if any(part.isdigit() for part in name.removeprefix(block).split("."))]
    return [name for name in (*anatomy.experts, *found) if name.startswith(f"{block}.")]


def _width_out(model: nn.Module, name: str) -> int:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear.out_features


def _is_norm(module: nn.Module) -> bool:
    if "norm" not in type(module).__name__.lower():
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1
