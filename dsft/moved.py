"""Stacks of matrices that their module keeps with another dimension first, which a number of ranks shares evenly.

FSDP2 shares out a first dimension of any size, and any other one only where the ranks divide it. Everything else of
dsft sees such a stack (E, out, in) as its class has it: products by a view, checkpoints and results by moving it back.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MOVED = "dsft_moved"
"""Name of a module's attribute that says which of its parameters are moved."""


def move(module: nn.Module, dims: Mapping[str, int], shared: dict[int, tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Keep each parameter that dims names with that dimension first. Its module must read it by stack from now on.

    shared: by id, what other modules' calls have moved, and what stands in its place; is added to.
    """
    for name, dim in dims.items():
        param = module._parameters[name]
        assert param is not None
        if id(param) not in shared:
            kept = param.detach().movedim(dim, 0).contiguous()
            shared[id(param)] = (param, nn.Parameter(kept, requires_grad=param.requires_grad))
            shared[id(param)][1].__dict__.update(param.__dict__)
        module._parameters[name] = shared[id(param)][1]
    module.__dict__[MOVED] = dict(dims)


def stack(module: nn.Module, name: str) -> Tensor:
    """Return the parameter (E, out, in) of module called name, moved or not."""
    param: Tensor = getattr(module, name)
    return back(param, moved(module).get(name, 0))


def moved(module: nn.Module) -> Mapping[str, int]:
    """Name -> dimension that is kept first, of the module's own parameters that are moved."""
    found = module.__dict__.get(MOVED, {})
    return found if isinstance(found, dict) else {}


def back(tensor: Tensor, dim: int) -> Tensor:
    """Return a moved tensor as it was before: a view, of a DTensor a DTensor. dim 0: it is not moved."""
    return tensor.movedim(0, dim) if dim else tensor


def forth(tensor: Tensor, dim: int) -> Tensor:
    """Move a tensor as move does: a view. dim 0: as it is."""
    return tensor.movedim(dim, 0) if dim else tensor


def shape_before(param: Tensor, dim: int) -> torch.Size:
    """Shape of a moved parameter as it was; whole, of a DTensor too."""
    return torch.empty(param.shape, device="meta").movedim(0, dim).shape if dim else param.shape
