"""The start-up self-test of packing: on the model itself, which was examined as a small copy of its class alone."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dsft.engine.assemble import Session

TOKENS, BOUND = 8, 1e-2
"""Tokens of an example, and the largest difference relative to the largest score."""


def require_apart(session: "Session", cast: AbstractContextManager[object]) -> None:
    """Require that what an example holds changes nothing of the next one in its row. Collective. cast: the precision.

    The median over positions is compared, as rounding may send a token to another expert. Raises RuntimeError on every
    rank.
    """
    if not session.family.packs:
        return
    rows = session.files.config.get_text_config().vocab_size
    first, last = (torch.arange(start, start + TOKENS) % rows for start in (1, 1 + TOKENS))
    session.model.eval()
    with torch.no_grad(), cast:
        scores = torch.stack([_scores_of_last(session, tokens, last) for tokens in (first, first.flip(0))])
    median = float((scores[0] - scores[1]).abs().median() / scores.abs().max())
    if median > BOUND:
        raise RuntimeError(
            f"{type(session.model).__name__}: examples in a row read each other, by {median:.0%} of the largest score, "
            "though a small copy of the model did not; do not train on it, and tell the authors of dsft"
        )


def _scores_of_last(session: "Session", first: Tensor, last: Tensor) -> Tensor:
    """Scores (TOKENS - 1,) float32 on CPU of an example that comes behind another one in its row.

    Of a model whose head may still be 0 the states (TOKENS - 1, width) before it.
    """
    device, places = session.world.device, torch.arange(TOKENS)
    asked = {"states": True} if session.files.labels else {"targets": last[1:].to(device)}
    scores = session.module(
        input_ids=torch.cat([first, last])[None].to(device),
        position_ids=torch.cat([places, places])[None].to(device),
        segment_lengths=(TOKENS, TOKENS),
        logits_to_keep=(TOKENS + places[:-1]).to(device),
        **asked,
        use_cache=False,
    ).logits[0]
    return scores.float().cpu()  # type: ignore[no-any-return]
