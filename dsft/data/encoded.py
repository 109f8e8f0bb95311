"""An example as tokens and mask, and its segments."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsft.data.masks import Ids


@dataclass(frozen=True, slots=True)
class Encoded:
    """tokens (L,) int32; mask (L,) bool, True = supervised; prompt: tokens before the last assistant turn's first, of a
    pair before both answers.

    empty_turns: supervised turns that the template renders to nothing but their end. asked: the prompt as the
    tokenizer writes it for a model that is to answer, where that is not the row's first tokens: a token across the
    border holds some of the answer, or the template writes a turn that was answered otherwise. Known only for samples
    whose answers can be judged. segments: tokens per segment, which lie end to end in tokens; empty: it is one.
    """

    tokens: Ids
    mask: NDArray[np.bool_]
    prompt: int
    empty_turns: int = 0
    asked: tuple[int, ...] | None = None
    segments: tuple[int, ...] = ()

    @property
    def parts(self) -> list[tuple[Ids, NDArray[np.bool_]]]:
        """Tokens and mask of each segment, in order."""
        if not self.segments:
            return [(self.tokens, self.mask)]
        borders = np.cumsum(self.segments[:-1], dtype=np.int64)
        return list(zip(np.split(self.tokens, borders), np.split(self.mask, borders), strict=True))

    @property
    def longest(self) -> int:
        """Tokens of its longest segment."""
        return max(self.segments, default=len(self.tokens))
