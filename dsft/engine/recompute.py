"""Gradient checkpointing: which blocks are computed again in backward instead of kept."""

from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from dsft.protocols import Anatomy

Recompute = Literal["none", "full", "selective"]


def recompute(model: nn.Module, anatomy: Anatomy, what: Recompute, *, reentrant: bool) -> None:
    """Mark the blocks: full = all, selective = every second one. Random streams are restored, so dropout is the same.

    Uses transformers' own gradient checkpointing layers. Reentrant checkpointing gives gradients only where a block's
    input needs one: the strategy that asks for it (ZeRO-3) sees to that.
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


def is_recomputed(what: Recompute, index: int) -> bool:
    """True if block index keeps its input alone."""
    return what == "full" or (what == "selective" and index % 2 == 0)
