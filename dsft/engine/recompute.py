"""How blocks are run in training: which are computed again in backward instead of kept, and whether by the compiler."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from torch import nn
from torch.utils.checkpoint import checkpoint

from dsft.engine.dropout import Draws
from dsft.models.routing import decided_once
from dsft.protocols import Anatomy

Recompute = Literal["none", "selective", "full"]
WAYS: tuple[Recompute, ...] = get_args(Recompute)
Run = Callable[..., Any]


def recompute(
    model: nn.Module,
    anatomy: Anatomy,
    what: Recompute,
    *,
    reentrant: bool,
    draws: Draws,
    run: Run | None = None,
) -> None:
    """Mark the blocks: full = all, selective = every second one. Draws, choices and torch's streams are restored.

    Uses transformers' own gradient checkpointing layers, which hand over a block's forward instead of calling it, in
    training alone; run, where given, is what calls it. Reentrant checkpointing gives gradients only where a block's
    input needs one: the strategy that asks for it (ZeRO-3) sees to that.
    """
    if what == "none" and run is None:
        return

    def again(forward: Run, *args: Any) -> Any:
        # one program of both passes chooses nothing: assemble refuses to compile what does
        same = draws.held(decided_once(forward) if run is None else forward)
        return checkpoint(same, *args, use_reentrant=reentrant, preserve_rng_state=True)

    for index, name in enumerate(anatomy.blocks):
        block = model.get_submodule(name)
        if not hasattr(block, "gradient_checkpointing"):
            wanted = "train.compile=true" if what == "none" else f"train.gradient_checkpointing={what}"
            raise ValueError(
                f"{wanted} needs a model whose blocks support gradient checkpointing, {type(block).__name__} does not; "
                "take train.compile=false and train.gradient_checkpointing=none"
            )
        recomputed = is_recomputed(what, index)
        if recomputed or run is not None:
            block.gradient_checkpointing = True  # type: ignore[assignment]
            block._gradient_checkpointing_func = _caller(again if recomputed else None, run)  # type: ignore[assignment]


def _caller(again: Run | None, run: Run | None) -> Run:
    """(forward, *args) -> what forward gives; at least one of both is there."""
    if again is None or run is None:
        return again or run  # type: ignore[return-value]
    return lambda forward, *args: again(partial(run, forward), *args)


def is_recomputed(what: Recompute, index: int) -> bool:
    """True if block index keeps its input alone."""
    return what == "full" or (what == "selective" and index % 2 == 0)
