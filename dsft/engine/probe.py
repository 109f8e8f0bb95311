"""The row of tokens whose logits prove a result, and those logits as the live model gives them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dsft.data.tokens import TokenSet
from dsft.engine.assemble import Session, autocast
from dsft.models.reach import reach
from dsft.models.routing import Recorded

LEAST = 64
"""Tokens of the row, where the model knows so many positions."""
AFTER = 48
"""Tokens behind the last length at which attention or rope change; the logits of all of them are compared."""
FEW = 16
"""Logits that are compared at the beginning, and behind each of the other lengths."""

LENGTHS = re.compile(r"(\w+_)?window(_size)?|\w*chunk_size|local_attention|original_max_position_embeddings")
"""Keys of a configuration whose value is a number of tokens beyond which something is computed otherwise."""


@dataclass(frozen=True)
class Row:
    """tokens (T,) and kept (P,), both int64: the positions whose logits are compared."""

    tokens: Tensor
    kept: Tensor


def probe_row(shape: Any, data: TokenSet, max_length: int, positions: int) -> Row:
    """A row that is longer than every window, chunk and original rope length of the model below max_length.

    It begins with the longest example; others follow where that one is too short, in a row like one long example.
    shape: the configuration of the language model; positions: those that the method takes before the first token.
    """
    known = reach(shape)
    limit = max_length if known is None else min(max_length, known - positions)
    passed = sorted({length for length in lengths_in(shape.to_dict()) if length < limit})
    size = min(max([LEAST, *(length + AFTER for length in passed[-1:])]), limit)
    longest = int(data.lengths.argmax())
    parts, count, row = list[Any](), 0, longest
    while count < size:
        example, _ = data.segments(row)[0]
        parts.append(example[: size - count].astype(np.int64))
        count, row = count + len(parts[-1]), (row + 1) % len(data)
    places = [range(max(size - AFTER, 0), size), *(range(at, at + FEW) for at in (0, *passed[:-1]))]
    kept = sorted({place for some in places for place in some if place < size})
    return Row(torch.from_numpy(np.concatenate(parts)), torch.tensor(kept))


def lengths_in(config: Mapping[str, Any]) -> Iterator[int]:
    """The numbers of tokens that LENGTHS finds in a configuration, and in what lies below it."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from lengths_in(value)
        elif LENGTHS.fullmatch(str(key)):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (each for each in values if type(each) is int and each > 0)


def write_probe(session: Session, row: Row, path: Path, digest: str) -> None:
    """Leave the live model's logits for row, and its choices of experts, in path for a fresh process. Collective."""
    session.model.eval()
    device, length = session.world.device, len(row.tokens)
    choices = Recorded()
    with torch.no_grad(), autocast(session), choices:
        logits = session.module(
            input_ids=row.tokens[None].to(device),
            position_ids=torch.arange(length, device=device)[None],
            segment_lengths=(length,),
            logits_to_keep=row.kept.to(device),
            use_cache=False,
        ).logits.float()
    if session.world.rank == 0:
        probe = {"tokens": row.tokens[None], "kept": row.kept, "logits": logits.cpu(), **choices.as_tensors()}
        save_file({name: value.contiguous() for name, value in probe.items()}, path, metadata={"digest": digest})
