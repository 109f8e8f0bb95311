"""An examination of a class with a head for sequences, on a small copy of it: dsft computes the same head."""

import copy
from typing import Any

import torch

from dsft.engine.scored import off
from dsft.models import sequence
from dsft.models.build import build_meta
from dsft.models.family import Family
from dsft.models.files import ModelFiles
from dsft.models.heads import head_name
from dsft.models.small import fill

TOKENS, ALIKE = 12, 1e-4
"""Tokens of the example, and the largest difference relative to the largest output."""


def require_head(files: ModelFiles) -> None:
    """Require that the class gives what its head gives of the last token's state; files: of a small copy, with labels.

    Raises ValueError for a head of another kind, as one on the first token or on a pooled state.
    """
    meta: Any = build_meta(files, torch.float32, "eager")
    try:
        apart, said = _difference(meta), ""
    except Exception as error:  # whatever a class raises over a call that it does not know
        apart, said = float("inf"), f": {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not apart <= ALIKE:
        said = said or f": it gives numbers that are off by {apart:.0%}"
        raise ValueError(
            f"model {files.name_or_path} must have a head that is one layer on the state of the last token, got "
            f"{type(meta).__name__}, whose head is none{said}; take an objective without such a head, or another model"
        )


@torch.no_grad()
def _difference(meta: Any) -> float:
    """How far what dsft computes is from what the class does, relative to the largest output."""
    config = copy.deepcopy(meta.config)
    config.pad_token_id = config.get_text_config().pad_token_id = None  # no token of the example is padding
    with torch.random.fork_rng(devices=[]):
        model = type(meta)._from_config(config, attn_implementation="eager").eval()
    fill(model)
    example = torch.arange(3, 3 + TOKENS)[None]
    theirs = model(input_ids=example).logits
    sequence.install(model, head_name(model), Family(model_type=config.model_type, attention="eager"))
    row = {"position_ids": torch.arange(TOKENS)[None], "segment_lengths": (TOKENS,), "use_cache": False}
    mine = model(input_ids=example, logits_to_keep=torch.tensor([TOKENS - 1]), **row).logits[:, 0]
    return off([mine], [theirs])
