"""From samples to tokens and masks: chat templates rendered, the assistant's part found, everything else unsupervised.

The rule of the mask, in one place: an assistant turn is what the template writes after the generation prompt, up to and
including the token that ends the turn. White space that the template writes after that token (the newline of ChatML)
belongs to no one and is not supervised: the model stops at the end-of-turn token and never has to write it. Where a
template ends turns without a special token, its closing white space is the only stop there is and stays supervised.
Where words, a token of the generation prompt or the header of a question follow it, they are no one's either. The last
turn of a row reaches to the end of its text: an end of text that the template writes there belongs to it, because a
model that answers writes it too, and the marked twins of such templates have it.
Where a template writes an earlier turn without the thoughts that its generation prompt opens (`<think>`), the turn
begins where it departs from the generation prompt. The first token of a row is never supervised, because nothing
predicts it. The tokens are those of apply_chat_template on the whole conversation, always; spans.py finds the turns
in it. A row of which no mask can be shown right is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np

from dsft.data.encoded import Encoded
from dsft.data.length import LengthBound, OverLong, portions
from dsft.data.marks import CannotRenderError, Span
from dsft.data.masks import Mask, Pair, TokenKinds, Turn, runs_of
from dsft.data.source import BadRow, Sample
from dsft.data.spans import Conversation
from dsft.data.templates import ChatTemplate, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation's text; the characters of its supervised turns and of its last assistant turn.

    asked: the text that a model is given to write the last turn, if that is wanted. marked: the mask of a template
    that marks the assistant's part itself, silent the turns in it that are not supervised all the same, with their
    characters where those are certain.
    """

    talk: Conversation
    learned: tuple[Turn, ...] = ()
    last: Turn | None = None
    asked: str | None = None
    marked: Mask | None = None
    silent: Mapping[int, Span | None] = field(default_factory=dict)


class Encoder:
    """A tokenizer's way to write samples. day: for templates that ask for the date; None: today.

    max_length: tokens; rows that certainly have more are not tokenised, and are OverLong. None: all are.
    Raises ValueError if the tokenizer cannot say where its tokens came from, or jinja cannot read its template.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", day: date | None = None, max_length: int | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"model must have a fast tokenizer, got {type(tokenizer).__name__}; add its tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.day = day or date.today()
        self.plain_template = self._template(tools=False)
        self.tools_template = self._template(tools=True) if isinstance(tokenizer.chat_template, Mapping) else None
        self.tools_template = self.tools_template or self.plain_template
        self.kinds = TokenKinds(tokenizer)
        self.max_length, self.bound = max_length, LengthBound(tokenizer)

    @property
    def reads_date(self) -> bool:
        """True if what the template writes depends on the day."""
        return any(each is not None and each.reads_date for each in (self.plain_template, self.tools_template))

    @property
    def renders_tools(self) -> bool:
        """True if the template does something with the tools that a row offers."""
        return self.tools_template is not None and self.tools_template.reads_tools

    def encode(self, samples: Sequence[Sample]) -> list[Encoded | OverLong | BadRow]:
        """Return a result per sample, in their order: a row that template or tokenizer refuse is a BadRow.

        Raises ValueError for what the model lacks altogether: a chat template for conversations, an end of text.
        """
        results: list[Encoded | OverLong | BadRow | None] = [None] * len(samples)
        chats: list[tuple[int, _Rendered]] = []
        plains: list[tuple[int, tuple[str, str]]] = []
        for index, sample in enumerate(samples):
            if self.template_of(sample) is None:
                halves = self.plain(sample)
                results[index] = self._over("".join(halves))
                if results[index] is None:
                    plains.append((index, halves))
                continue
            rendered = self._render(sample)
            if isinstance(rendered, BadRow | OverLong):
                results[index] = rendered
            else:
                chats.append((index, rendered))
        texts = [rendered.talk.full for _, rendered in chats]
        for (index, rendered), pair in zip(chats, self.tokenize(texts, special=False), strict=True):
            results[index] = self._chat(samples[index], rendered, pair)
        texts = [given + learned for _, (given, learned) in plains]
        for (index, halves), pair in zip(plains, self.tokenize(texts, special=True), strict=True):
            results[index] = self._text(samples[index], halves, pair)
        assert None not in results
        return [each for each in results if each is not None]

    def ends_turn(self, token: int) -> bool:
        """True if token is a special one, as those that end a turn or a text are."""
        return token in self.kinds.special

    def _template(self, *, tools: bool) -> ChatTemplate | None:
        """The template that transformers takes for rows with or without tools."""
        if not self.tokenizer.chat_template:
            return None
        try:
            source = self.tokenizer.get_chat_template(tools=[{}] if tools else None)
        except ValueError as error:
            raise ValueError(
                f"model must have a chat template called default, got others: {one_line(error)}; name one of them so"
            ) from None
        return ChatTemplate(self.tokenizer, source, self.day)

    def template_of(self, sample: Sample) -> ChatTemplate | None:
        """The template that writes the sample; None for plain text, and where the tokenizer has none."""
        return None if not sample.messages else self.tools_template if sample.tools else self.plain_template

    def _over(self, text: str) -> OverLong | None:
        return None if self.max_length is None else self.bound.over(text, self.max_length)

    def _render(self, sample: Sample) -> _Rendered | OverLong | BadRow:
        """The whole conversation as text and its turns' characters, or why there is none."""
        template = self.template_of(sample)
        assert template is not None
        if sample.tools and not template.reads_tools:
            return _bad(sample, "offer no tools to a chat template that does not read them", f"{len(sample.tools)}",
                        "set data.ignore=[tools] or use a model that is told of tools")  # fmt: skip
        turns = [index for index, message in enumerate(sample.messages) if message["role"] == "assistant"]
        learned = [index for index in turns if sample.learned is None or sample.learned[index]]
        if learned[:1] == [0]:
            return _bad(sample, "start with a user or system turn", "assistant", "drop it or set data.system")
        try:
            talk = Conversation(template, sample.messages, sample.tools)
        except CannotRenderError as error:
            return _bad(sample, "fit the model's chat template", f"its refusal: {error}", "drop the row")
        if over := self._over(talk.full):
            return over
        if sample.silent and sample.entry is None:
            return _Rendered(talk)
        turn = 0
        try:
            asked = talk.before(turns[-1]) if turns and sample.entry is not None else None
            if template.marks_itself:
                silent = {turn: talk.silenced(turn) for turn in turns if turn not in learned}
                return _Rendered(talk, asked=asked, marked=_marks(template, sample), silent=silent)
            spans = {}
            for turn in sorted({*learned, *turns[-1:]} - {0}):
                spans[turn] = talk.turn(turn)
        except CannotRenderError as error:
            return _untold(sample, f"turn {turn + 1}: {error}", marked=template.marks_itself)
        return _Rendered(talk, tuple(spans[turn] for turn in learned), spans.get(turns[-1]) if turns else None, asked)

    def _chat(self, sample: Sample, rendered: _Rendered, pair: Pair | str) -> Encoded | BadRow:
        """Tokens and mask of a conversation."""
        if isinstance(pair, str):
            return _untokenised(sample, pair)
        tokens, text = pair[0], rendered.talk.full
        if rendered.marked is not None:
            spans, mask = runs_of(rendered.marked), rendered.marked.copy()
            try:
                self.kinds.silence(mask, text, pair, silent=rendered.silent, said=rendered.talk.said)
            except CannotRenderError as error:
                return _untold(sample, str(error), marked=True)
            learned, last = [span for span in spans if mask[slice(*span)].any()], spans[-1] if spans else None
        else:
            learned = [self.kinds.turn(text, pair, turn) for turn in rendered.learned]
            mask = np.zeros(len(tokens), dtype=np.bool_)
            for first, end in learned:
                mask[first:end] = True
            last = self.kinds.turn(text, pair, rendered.last) if rendered.last else None
        mask[:1] = False
        prompt = last[0] if last else len(tokens)
        kinds = self.kinds
        empty = sum(
            all(kinds.is_blank(t) or t in kinds.tags for t in tokens[slice(*span)].tolist()) for span in learned
        )
        encoded = Encoded(tokens, mask, prompt, empty)
        if rendered.asked is None:
            return encoded
        (given,) = self.tokenize([rendered.asked], special=False)
        if isinstance(given, str):
            return _untokenised(sample, given)
        asked = given[0]
        same = asked.tolist() == tokens[:prompt].tolist()
        return encoded if same else replace(encoded, asked=tuple(asked.tolist()))

    def _text(self, sample: Sample, halves: tuple[str, str], pair: Pair | str) -> Encoded | BadRow:
        """Tokens and mask of plain text: the second half is supervised, with an end of text behind it."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError(
                "model must have a tokenizer with an end-of-text token for plain text, got none; set its eos_token"
            )
        if isinstance(pair, str):
            return _untokenised(sample, pair)
        (given, learned), (tokens, offsets) = halves, self.opened(pair)
        span = len(given), len(given) + len(learned)
        first = self.kinds.covered(given + learned, (tokens, offsets), span)[0] if given else 0
        tokens = np.append(tokens, np.int32(eos))
        return Encoded(tokens, (np.arange(len(tokens)) >= max(first, 1)) & (not sample.silent), first)

    def opened(self, pair: Pair) -> Pair:
        """The pair without the end of text that some tokenizers write themselves."""
        tokens, offsets = pair
        ended = len(tokens) > 0 and tokens[-1] == self.tokenizer.eos_token_id
        return (tokens[:-1], offsets[:-1]) if ended else pair

    def plain(self, sample: Sample) -> tuple[str, str]:
        """Return prompt and answer of a sample without a chat template. Raises ValueError if it needs one."""
        if sample.plain is None:
            what = "a system message" if len(sample.messages) == 3 else "conversations"
            raise ValueError(
                f"model must have a chat template for {what}, as {sample.place} has, got none; use an instruct model"
            )
        return sample.plain

    def tokenize(self, texts: list[str], *, special: bool) -> list[Pair | str]:
        """Per text its tokens (L,) and their characters (L, 2), or why the tokenizer cannot read it."""
        found: list[Pair | str] = []
        for part in portions(texts):
            try:
                found += self._backend(part, special=special)
            except MemoryError:
                raise
            except Exception:  # tokenizers raises no narrower class; which text it is, it does not say
                found += [self._tokenize_one(text, special=special) for text in part]
        return found

    def _tokenize_one(self, text: str, *, special: bool) -> Pair | str:
        try:
            text.encode()
            return self._backend([text], special=special)[0]
        except UnicodeEncodeError as error:
            return f"{text[error.start]!a}, half of a character"
        except MemoryError:
            raise
        except Exception as error:  # a token that is missing from the vocabulary is an Exception of no other class
            return one_line(error)

    def _backend(self, texts: list[str], *, special: bool) -> list[Pair]:
        """Much faster than tokenizer(...) with offsets."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encodings = backend.encode_batch(texts, add_special_tokens=special)
        return [
            (np.array(e.ids, dtype=np.int32), np.array(e.offsets, dtype=np.int32).reshape(-1, 2)) for e in encodings
        ]


def _marks(template: ChatTemplate, sample: Sample) -> Mask:
    """The mask (L,) of a template that marks the assistant's part itself ({% generation %}): its word is taken."""
    row: Any = template.apply(
        sample.messages, sample.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return np.array(row["assistant_masks"], dtype=np.bool_)


def _bad(sample: Sample, rule: str, got: str, way_out: str) -> BadRow:
    return BadRow(sample.source, sample.row, sample.place, f"{sample.place} must {rule}, got {got}; {way_out}")


def _untokenised(sample: Sample, reason: str) -> BadRow:
    return _bad(sample, "hold text that the model's tokenizer can read", reason, "correct it or drop the row")


def _untold(sample: Sample, reason: str, *, marked: bool) -> BadRow:
    way_out = "write each message in the template's loop over them" if marked else (
        "mark the assistant's part in the template with {% generation %}"
    )  # fmt: skip
    rule = "have turns whose part in the chat template's text can be told"
    return _bad(sample, rule, f"one of which it cannot ({reason})", f"{way_out}, or drop the row")
