"""Gradient checkpointing: which blocks are computed again in backward instead of kept."""

from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsft.protocols import Anatomy

Recompute = Literal["none", "full", "selective"]


def recompute(model: nn.Module, anatomy: Anatomy, what: Recompute, *, reentrant: bool) -> None:
    """Mark the blocks: full = all, selective = every second one. Random streams are restored, so dropout is the same.

    Uses transformers' own gradient checkpointing layers. Reentrant checkpointing (ZeRO-3) gives gradients only where a
    block's input needs one, so the embedding's output is made to.
    """
    if what == "none":
        return
    again = partial(checkpoint, use_reentrant=reentrant, preserve_rng_state=True)
    for index, name in enumerate(anatomy.blocks):
        block = model.get_submodule(name)
        if not hasattr(block, "gradient_checkpointing"):
            raise ValueError(
                f"train.gradient_checkpointing={what} needs a model whose blocks support it, "
                f"{type(block).__name__} does not; take train.gradient_checkpointing=none"
            )
        if is_recomputed(what, index):
            block.gradient_checkpointing = True  # type: ignore[assignment]
            block._gradient_checkpointing_func = again  # type: ignore[assignment]
    if reentrant:
        model.get_submodule(anatomy.embedding).register_forward_hook(_needs_grad)


def is_recomputed(what: Recompute, index: int) -> bool:
    """True if block index keeps its input alone."""
    return what == "full" or (what == "selective" and index % 2 == 0)


def _needs_grad(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_(True)
