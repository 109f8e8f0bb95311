"""From samples to tokens and masks: chat templates rendered, the assistant's part found, everything else unsupervised.

The rule of the mask, in one place: an assistant turn is what the template writes after the generation prompt, up to and
including the token that ends the turn. White space that the template writes after that token (the newline of ChatML)
belongs to no one and is not supervised: the model stops at the end-of-turn token and never has to write it. Where a
template ends turns without a special token, its closing white space is the only stop there is and stays supervised.
The first token of a row is never supervised, because nothing predicts it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray

from dsft.data.source import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """tokens (L,) int32; mask (L,) bool, True = supervised; prompt: tokens before the last assistant turn's first.

    empty_turns: supervised turns that the template renders to nothing but their end.
    """

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]
    prompt: int
    empty_turns: int = 0


class Encoder:
    """A tokenizer's way to write samples. Raises ValueError if the tokenizer cannot say where its tokens came from."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"model must have a fast tokenizer, got {type(tokenizer).__name__}; add its tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.template: str | None = tokenizer.get_chat_template() if tokenizer.chat_template else None
        self.marked = self.template is not None and bool(re.search(r"\{%-?\s*generation\s*-?%\}", self.template))
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset(special | set(tokenizer.all_special_ids))
        self.blank: dict[int, bool] = {}

    def encode(self, samples: Sequence[Sample]) -> list[Encoded]:
        """One Encoded per sample. Raises ValueError naming the place of a sample that the template cannot render."""
        chats = [i for i, sample in enumerate(samples) if self.template is not None and sample.messages]
        plains = sorted(set(range(len(samples))) - set(chats))
        encoded: dict[int, Encoded] = {}
        if self.marked:
            encoded.update(zip(chats, self._encode_marked([samples[i] for i in chats]), strict=True))
        else:
            encoded.update(zip(chats, self._encode_chats([samples[i] for i in chats]), strict=True))
        encoded.update(zip(plains, self._encode_plain([samples[i] for i in plains]), strict=True))
        return [encoded[i] for i in range(len(samples))]

    def ends_turn(self, token: int) -> bool:
        """True if token is a special one, as those that end a turn or a text are."""
        return token in self.special

    def _encode_chats(self, samples: Sequence[Sample]) -> list[Encoded]:
        rendered = [self._render_spans(sample) for sample in samples]
        encodings = self._tokenize([text for text, _ in rendered], add_special_tokens=False)
        encoded = []
        for (_, spans), (tokens, offsets) in zip(rendered, encodings, strict=True):
            mask, prompt = np.zeros(len(tokens), dtype=np.bool_), len(tokens)
            for span in spans:
                first, last = self._turn_tokens(tokens, offsets, span)
                mask[first:last], prompt = True, first
            mask[:1] = False
            encoded.append(Encoded(tokens, mask, prompt))
        return encoded

    def _encode_marked(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Templates that mark the assistant's part themselves ({% generation %}): their word is taken."""
        encoded = []
        for sample in samples:
            row: Any = self._apply(
                sample, sample.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            mask = np.array(row["assistant_masks"], dtype=np.bool_)
            mask[:1] = False
            starts = np.flatnonzero(mask & ~np.roll(mask, 1))
            encoded.append(
                Encoded(np.array(row["input_ids"], dtype=np.int32), mask, int(starts[-1]) if len(starts) else len(mask))
            )
        return encoded

    def _encode_plain(self, samples: Sequence[Sample]) -> list[Encoded]:
        pairs = [self._plain(sample) for sample in samples]
        encodings = self._tokenize([given + learned for given, learned in pairs], add_special_tokens=True)
        eos = self.tokenizer.eos_token_id
        if samples and eos is None:
            raise ValueError(
                "model must have a tokenizer with an end-of-text token for plain text, got none; set its eos_token"
            )
        encoded = []
        for (given, learned), (tokens, offsets) in zip(pairs, encodings, strict=True):
            if len(tokens) and tokens[-1] == eos:
                tokens, offsets = tokens[:-1], offsets[:-1]
            span = (len(given), len(given) + len(learned))
            first = _covered(offsets, span)[0] if given else 0
            tokens = np.append(tokens, np.int32(eos))
            mask = np.arange(len(tokens)) >= max(first, 1)
            encoded.append(Encoded(tokens, mask, first))
        return encoded

    def _plain(self, sample: Sample) -> tuple[str, str]:
        if sample.plain is None:
            what = "a system message" if len(sample.messages) == 3 else "conversations"
            raise ValueError(
                f"model must have a chat template for {what}, as {sample.place} has, got none; use an instruct model"
            )
        return sample.plain

    def _render_spans(self, sample: Sample) -> tuple[str, list[Span]]:
        """The whole conversation as text, and the characters of each assistant turn in it, end of turn included."""
        full, spans = self._render(sample, len(sample.messages)), []
        for index, message in enumerate(sample.messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise ValueError(
                    f"{sample.place} must start with a user or system turn, got assistant; drop it or set data.system"
                )
            before = self._render(sample, index, add_generation_prompt=True)
            after = full if index + 1 == len(sample.messages) else self._render(sample, index + 1)
            if not (full.startswith(before) and full.startswith(after)):
                raise ValueError(
                    f"model must have a chat template that never rewrites earlier text, got one that does "
                    f"(turn {index + 1} of {sample.place}); mark the assistant's part in it with {{% generation %}}"
                )
            spans.append((len(before), len(after)))
        return full, spans

    def _render(self, sample: Sample, count: int, *, add_generation_prompt: bool = False) -> str:
        return str(
            self._apply(sample, sample.messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def _apply(self, sample: Sample, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), **options)
        except TemplateError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{sample.place} must fit the model's chat template, got its refusal: {reason}; drop the row"
            ) from None

    def _tokenize(
        self, texts: list[str], *, add_special_tokens: bool
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Per text its tokens (L,) and their characters (L, 2); much faster than tokenizer(...) with offsets."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encodings = backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [
            (np.array(e.ids, dtype=np.int32), np.array(e.offsets, dtype=np.int32).reshape(-1, 2)) for e in encodings
        ]

    def _turn_tokens(self, tokens: NDArray[np.int32], offsets: NDArray[np.int32], span: Span) -> Span:
        """First and last + 1 token of the assistant turn in span, cut after the token that ends it."""
        first, last = _covered(offsets, span)
        end = last
        while end > first and self._is_blank(int(tokens[end - 1])):
            end -= 1
        return first, end if end > first and self.ends_turn(int(tokens[end - 1])) else last

    def _is_blank(self, token: int) -> bool:
        """True if token is white space and not a special token; remembered, because most rows end with the same one."""
        if token not in self.blank:
            self.blank[token] = not self.ends_turn(token) and not str(self.tokenizer.decode([token])).strip()
        return self.blank[token]


def _covered(offsets: NDArray[np.int32], span: Span) -> Span:
    """First and last + 1 of the tokens with a character in span; a token across its border counts.

    Byte-level tokenizers trim spaces off the offsets, so a token of white space may be empty: one inside span counts.
    """
    inside = np.flatnonzero((offsets[:, 0] < span[1]) & (offsets[:, 1] > span[0]))
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (len(offsets), len(offsets))
