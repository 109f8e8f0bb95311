"""From characters to tokens: which tokens belong to a turn, and with which one it ends."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsft.data.marks import CannotRenderError, Span
from dsft.data.numbered import Places

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]
Pair = tuple[Ids, Ids]
"""Tokens (L,) and their first and last + 1 characters (L, 2)."""
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Turn:
    """The characters of an assistant turn: from behind its header to where the next turn or the text's end is.

    said: where what it says ends, None if that cannot be told. rest: the character from which on it ends with the
    header of a question, its end if it does not. prompt: gives what the template writes for a generation prompt.
    """

    first: int
    end: int
    said: int | None
    rest: int
    prompt: Callable[[], str]

    @property
    def span(self) -> Span:
        """First and last + 1 character."""
        return self.first, self.end


class TokenKinds:
    """A tokenizer's tokens: which are special, which are tags, which are white space."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special = frozenset({i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids))
        opened = ("<>", "[]")
        self.tags = self.special | {i for i, token in added.items() if token.content[:1] + token.content[-1:] in opened}
        self._blank: dict[int, bool] = {}

    def is_blank(self, token: int) -> bool:
        """True if token is white space and not a special token; remembered, because most rows end with the same one."""
        if token not in self._blank:
            self._blank[token] = token not in self.special and not str(self.tokenizer.decode([token])).strip()
        return self._blank[token]

    def says_nothing(self, token: int) -> bool:
        """True if token is white space, special or a tag."""
        return token in self.tags or self.is_blank(token)

    def covered(self, text: str, pair: Pair, span: Span) -> Span:
        """First and last + 1 of the tokens with a character in span; one across its border counts if it is no special.

        Byte-level tokenizers trim spaces off the offsets, so a token of white space may be empty: one inside span
        counts. A special token may take white space on either side along (rstrip, lstrip): it is where its name is.
        """
        tokens, offsets = pair
        inside = np.flatnonzero((offsets[:, 0] < span[1]) & (offsets[:, 1] > span[0])).tolist()
        while inside and not self._named_in(text, pair, inside[0], span):
            inside = inside[1:]
        while inside and not self._named_in(text, pair, inside[-1], span):
            inside = inside[:-1]
        if inside:
            return inside[0], inside[-1] + 1
        at = int(np.searchsorted(offsets[:, 0], span[0])) if span[0] < span[1] and len(text) > span[1] else len(tokens)
        return at, at

    def silence(self, mask: Mask, text: str, pair: Pair, *, silent: Mapping[int, Span | None], said: Places) -> None:
        """Leave out of a template's own mask (L,) what it marks of the turns that are not to be supervised.

        silent: their characters, None where those are not certain; they are then told by what the turns say, of which
        said has the places. Raises CannotRenderError where that is not certain either.
        """
        unsure = set()
        for turn, span in silent.items():
            first, end = self.covered(text, pair, span) if span else (0, 0)
            if not mask[first:end].any() and (span is None or turn not in said):
                unsure.add(turn)
            mask[first:end] = False
        if not unsure:
            return
        where = f"turn {min(unsure) + 1}, not to be learned"
        if not all(said.get(turn) for turn in unsure):
            raise CannotRenderError(f"{where}: what it says is not in the text as it stands in the row")
        for first, end in runs_of(mask):
            reach = int(pair[1][first, 0]), int(pair[1][end - 1, 1])
            owners = {turn for turn, numbers in said.items() if any(reach[0] <= at <= reach[1] for at in numbers)}
            if not owners or (owners & unsure and owners - unsure):
                raise CannotRenderError(f"{where}: the template marks it together with another, or more than it says")
            if owners <= unsure:
                mask[first:end] = False

    def _named_in(self, text: str, pair: Pair, at: int, span: Span) -> bool:
        if int(pair[0][at]) not in self.special:
            return True
        first, end = pair[1][at].tolist()
        name = text[first:end]
        return span[0] <= first + len(name) - len(name.lstrip()) < span[1] if name.strip() else True

    def turn(self, text: str, pair: Pair, turn: Turn) -> Span:
        """First and last + 1 token of the turn, cut after the token that ends it."""
        tokens, offsets = pair
        if turn.first == turn.end:
            return (at := int(np.searchsorted(offsets[:, 0], turn.first))), at
        first, last = self.covered(text, pair, turn.span)
        last = self._ended(text, pair, turn, (first, last))
        end = last
        while end > first and self.is_blank(int(tokens[end - 1])):
            end -= 1
        return first, end if end > first and int(tokens[end - 1]) in self.special else last

    def _ended(self, text: str, pair: Pair, turn: Turn, span: Span) -> int:
        """The last + 1 token of a turn, without what the template writes behind it that is another turn's or no one's.

        Behind what a turn says stands the token that ends it. More of the kind may follow (an end of text), but words,
        a token of the generation prompt and the header of a question are not the model's to write.
        """
        tokens, offsets = pair
        if turn.said is None:
            return span[1]
        behind = [at for at in range(*span) if offsets[at, 0] >= turn.said]
        ends = next((at for at in behind if int(tokens[at]) in self.special), None)
        cut = next((at for at in behind if turn.rest <= offsets[at, 0]), span[1]) if turn.rest < turn.end else span[1]
        if ends is None:
            return cut
        prompt = None
        for at in range(ends + 1, max(cut, ends + 1)):
            token = int(tokens[at])
            if self.is_blank(token):
                continue
            prompt = turn.prompt() if prompt is None else prompt
            if token not in self.special:
                return at if prompt else ends + 1
            if text[slice(*offsets[at])].strip() in prompt:
                return at
        return max(cut, ends + 1)


def runs_of(mask: Mask) -> list[Span]:
    """First and last + 1 of the stretches that are supervised."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(first), int(end)) for first, end in zip(edges[::2], edges[1::2], strict=True)]


def shared_end(text: str, others: Iterable[str]) -> int:
    """Characters with which text and the one of others that has most in common with it end; 0 for white space."""
    longest = 0
    for other in others:
        length = 0
        while length < min(len(text), len(other)) and text[-1 - length] == other[-1 - length]:
            length += 1
        longest = max(longest, length)
    return longest if text[len(text) - longest :].strip() else 0
