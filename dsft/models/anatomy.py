"""Where a model's parts are, found by structure: blocks, linears by role, head, embedding, experts."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsft.models.heads import head_name, is_classifier
from dsft.packed import stacked
from dsft.protocols import Anatomy

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def dissect(model: Any) -> Anatomy:
    """Read the anatomy of a transformers causal language model, or of one with a head for sequences (meta included).

    Raises ValueError if it has no repeated blocks or no head, or if its blocks see what comes after a token.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not lists:
        raise ValueError(f"model must be a stack of repeated blocks, got {type(model).__name__} without a ModuleList")
    base = model.get_decoder() if hasattr(model, "get_decoder") else model
    stack, layers = next(
        ((name, m) for name, m in lists if m is getattr(base, "layers", None)),
        max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters())),
    )
    blocks = tuple(f"{stack}.{index}" for index in range(len(layers)))
    if any(getattr(module, "is_causal", True) is False for module in layers.modules()):
        raise ValueError(
            f"model must be causal, got {type(model).__name__}, an encoder, whose tokens see what follows them"
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if is_classifier(model):
        head = model.get_submodule(head_name(model))
    if head is None or embedding is None:
        raise ValueError(f"model must have a language-model head, got {type(model).__name__}")
    names = {id(m): name for name, m in model.named_modules()}
    linears, experts = {}, []
    for name, module in model.named_modules():
        if not name.startswith(f"{stack}."):
            continue
        if isinstance(module, nn.Linear) and module.out_features > 1 and _gives_rows(module):  # one output is a gate
            linears[name] = _role(name.removeprefix(f"{stack}."))
        elif _stacks_experts(module):
            experts.append(name)
    return Anatomy(
        blocks=blocks,
        linears=linears | dict(_beside_experts(model, blocks, linears, experts)),
        embedding=names[id(embedding)],
        head=names[id(head)],
        tied=getattr(head, "weight", None) is getattr(embedding, "weight", None),
        experts=tuple(experts),
    )


@torch.no_grad()
def _gives_rows(linear: nn.Linear) -> bool:
    """Whether it takes rows (T, in) and gives (T, out); one whose class computes group by group does not."""
    if type(linear).forward is nn.Linear.forward:
        return True
    weight = linear.weight
    try:
        given: Any = linear.forward(torch.empty(3, linear.in_features, device=weight.device, dtype=weight.dtype))
    except Exception:  # of any class, over a shape that it does not take
        return False
    return isinstance(given, Tensor) and given.shape == (3, linear.out_features)


def _role(name: str) -> str:
    path = name.lower()
    if "attn" in path or "attention" in path:
        return "attention"
    if any(word in path for word in ("mlp", "feed_forward", "expert", "ffn")):
        return "mlp"
    return "other"


def _beside_experts(
    model: nn.Module, blocks: Iterable[str], linears: Iterable[str], experts: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """(name, role) of each linear in a module that holds fused experts and is no block.

    What is called so, or has as many outputs as there are experts and no other linear beside it, is the router.
    """
    for stack in (name for name in experts if "expert" in name.rpartition(".")[2].lower()):
        owner = stack.rpartition(".")[0]
        count = next(iter(stacked(model.get_submodule(stack)).values()))[0]
        inside = [name for name in linears if name.startswith(f"{owner}.") and not name.startswith(f"{stack}.")]
        parts = Counter(name.removeprefix(f"{owner}.").partition(".")[0] for name in inside)
        for name in inside if owner not in blocks else ():
            part = name.removeprefix(f"{owner}.").partition(".")[0]
            routes = parts[part] == 1 and model.get_submodule(name).out_features == count
            routes = routes or part in ("gate", "router")
            yield name, "router" if routes else "shared_experts"


def _stacks_experts(module: nn.Module) -> bool:
    """True for a module whose own weights are 3-D, packed or not: fused experts; a convolution's kernel is none."""
    return not isinstance(module, CONVOLUTIONS) and bool(stacked(module))
