"""Which characters of a conversation's text are an assistant turn: from after its header to where its end is written.

Where the template only ever adds to what it wrote, the text before the turn (with the generation prompt) and the text
up to it are beginnings of the whole, and the turn lies between them. Where it renders earlier turns otherwise than the
last one (an empty think block in the last turn only, an end of text at the very end), the turn's block is looked up in
the marked text, and its header is that part of the generation prompt with which the block begins. Either way gives the
same characters; a turn of which neither shows them is refused. So is one that does not hold all that it says in the
text, or that holds what another turn says (numbered.py).
"""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from dsft.data.marks import NEVER, CannotRenderError, Span, Traced
from dsft.data.masks import Turn, shared_end
from dsft.data.numbered import NUMBER, Places, numbered, places
from dsft.data.templates import ChatTemplate, Message

_THINKING = re.compile(r"\s*(?:[<\[]\W{0,2}\w{0,8}?(?:think|thought|reason)|$)", re.IGNORECASE)
"""How a generation prompt goes on that opens a block of thoughts, which a template leaves out of other turns."""


class Conversation:
    """One row's messages under a template. before and turn raise CannotRenderError with the reason."""

    def __init__(self, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        self.template = template
        self.messages = messages
        self.tools = tools
        self.full = template.text(messages, tools)
        self._traced: Traced | None = None
        self._apart: Traced | None = None
        self._before: dict[int, str] = {}

    def before(self, index: int) -> str:
        """The text that a model is given to write message index: the ones before it and the generation prompt."""
        if index == 0:
            raise CannotRenderError("nothing stands before it")
        if index not in self._before:
            self._before[index] = self.template.text(self.messages[:index], self.tools, prompt=True)
        return self._before[index]

    def turn(self, index: int) -> Turn:
        """The characters of assistant turn index, its end included; with nothing written for it, an empty span."""
        first, end = span = self.added(index) or self.looked_up(index)
        self._check(index, span)
        numbers = self.said.get(index)
        if not numbers or self.messages[index].get("tool_calls"):
            if first < end:
                first += self._header_of_a_word(index, first)
            return Turn(first, end, None, end, str)
        first += self._header(index, self.full[first : numbers[0]])
        said = numbers[-1]
        rest = end - shared_end(self.full[said:end], [self.full[:at] for at in self._questions()])
        return Turn(first, end, said, rest, lambda: self._prompt_alone(index))

    def _questions(self) -> list[int]:
        """Where the first message's content begins, in a list; without one, nothing."""
        return [numbers[0] for numbers in [self.said.get(0)] if numbers]

    def _prompt_alone(self, index: int) -> str:
        """What the template writes for a generation prompt before turn index."""
        before, plain = self.before(index), self.template.text(self.messages[:index], self.tools)
        return before[_shared(before, plain) :]

    def _header(self, index: int, written: str) -> int:
        """Characters of a header with which the turn begins though no generation prompt wrote it, of those written.

        Raises CannotRenderError if there may be one that is not another turn's generation prompt.
        """
        if _THINKING.match(written):
            return 0
        try:
            if self._prompt_alone(index):
                return 0
        except CannotRenderError:  # it wants an answer or a prompt behind a question, so it writes one
            return 0
        others = (i for i, message in enumerate(self.messages) if message["role"] == "assistant" and 0 < i != index)
        if not any(written == self._prompt_alone(other) for other in others):
            raise CannotRenderError(f"it begins with {written!r}, which the template does not write as a prompt for it")
        return len(written)

    def _header_of_a_word(self, index: int, first: int) -> int:
        """_header of a turn that calls tools or says nothing, seen by the one that a word in its place has.

        Characters from first on. Raises CannotRenderError as _header does.
        """
        said = [*self.messages[:index], {"role": "assistant", "content": "word"}]
        try:
            if self._prompt_alone(index):
                return 0
            word = Conversation(self.template, said, self.tools)
            span, numbers = word.added(index), word.said.get(index)
        except CannotRenderError:  # the template takes no word here: what it would write before it is not known
            return 0
        if span is None or not numbers:
            return 0
        written = word.full[span[0] : numbers[0]]
        return word._header(index, written) if self.full.startswith(written, first) else 0

    @cached_property
    def said(self) -> Places:
        """Where the text holds what the messages say."""
        return places(self.full, self.messages, lambda messages: self.template.text(messages, self.tools))

    def silenced(self, index: int) -> Span | None:
        """The characters of the block of a turn that is not to be supervised; None if they are not certain."""
        try:
            first, end = span = self.block(index)
            if not self.full[first:end].strip():
                return None
            self._check(index, span)
        except CannotRenderError:
            return None
        return span

    def _check(self, index: int, span: Span) -> None:
        """Raise CannotRenderError unless span holds all of what the turn says in the text, and of no other turn."""
        first, end = span
        for other, numbers in self.said.items():
            if other == index and not all(at <= end and self._opens(index, at, first) for at in numbers):
                raise CannotRenderError("it writes what the turn says elsewhere too")
            if other != index and any(first < at < end for at in numbers):
                raise CannotRenderError("it writes another turn among it")

    def added(self, index: int) -> Span | None:
        """The turn's characters where the template only adds to what it wrote before, else None."""
        before = self.before(index)
        if not self.full.startswith(before):
            return None
        if index + 1 == len(self.messages):
            return len(before), len(self.full)
        try:
            after = self.template.text(self.messages[: index + 1], self.tools)
        except CannotRenderError:  # a template may want another turn behind this one
            return None
        whole = len(before) <= len(after) and self.full.startswith(after)
        return (len(before), len(after)) if whole else None

    def looked_up(self, index: int) -> Span:
        """The turn's characters by the marks of the template's loops."""
        first, end = self.block(index)
        block = self.full[first:end]
        if not block.strip():
            self._check_unwritten(index)
            return end, end
        if index + 1 == len(self.messages):
            end = len(self.full)  # what closes the whole closes this turn
        for prompt in self._prompts(index, first):
            if block.startswith(prompt):
                return first + len(prompt), end
            if self.full.endswith(prompt, 0, first):  # the turn before it has written the header
                return first, end
            apart = self._told_apart().block(index)
            if apart.startswith(NEVER):  # no header: it goes on with the turn before it
                return first, end
            shared = min(_shared(block, prompt), _shared(apart, prompt))
            for length in range(shared, 0, -1):
                if prompt[:length].strip() and _THINKING.match(prompt, length):
                    return first + length, end
        raise CannotRenderError("it begins otherwise than with the generation prompt")

    def _opens(self, index: int, at: int, first: int) -> bool:
        """True if what the turn says from at on is its own, or opens its thoughts as the generation prompt does."""
        opened = self.full[at:first]
        return _THINKING.match(opened) is not None and opened in self.before(index)

    def _check_unwritten(self, index: int) -> None:
        """Raise CannotRenderError unless the turn, of which the loops wrote nothing, is shown to be nowhere else."""
        more = any(value for key, value in self.messages[index].items() if key not in ("role", "content"))
        if more or self.said.get(index) != ():
            raise CannotRenderError("it writes nothing for it in its loops over the messages, but may elsewhere")

    def block(self, index: int) -> Span:
        """What the template wrote while its loop was at the message."""
        if self._traced is None:
            self._traced = self.template.trace(self.messages, self.tools)
        spans = [span for _, span in sorted(self._traced.blocks.items()) if span[0] < span[1]]
        if index in self._traced.unclear or spans != sorted(spans):
            raise CannotRenderError("it writes turns twice, inside each other, or in another order")
        if index not in self._traced.blocks:
            raise CannotRenderError("it does not write it in a loop over the messages")
        if any(number != str(index) for number in NUMBER.findall(self._told_apart().block(index))):
            raise CannotRenderError("it writes another turn among it")
        return self._traced.blocks[index]

    def _prompts(self, index: int, first: int) -> Iterator[str]:
        """The generation prompt before turn index, whose block begins at first: by the text, then by the marks."""
        before, past = self.before(index), self.full[:first]
        if before.startswith(past):
            yield before[len(past) :]
        asked = self.template.trace(self.messages[:index], self.tools, prompt=True)
        last, extra = asked.last, ""
        if index - 1 in asked.blocks:
            plain = self.template.trace(self.messages[:index], self.tools)
            shorter, longer = plain.block(index - 1), asked.block(index - 1)
            if not longer.startswith(shorter):
                raise CannotRenderError("it rewrites a turn for a generation prompt")
            last, extra = asked.blocks[index - 1][1], longer[len(shorter) :]
        yield extra + asked.text[last:]

    def _told_apart(self) -> Traced:
        """The conversation once more, where what each message says stands between its number in noncharacters.

        A template may render the answers of tools while its loop is at the turn that called them: that is seen here.
        """
        if self._apart is None:
            self._apart = self.template.trace([numbered(*each) for each in enumerate(self.messages)], self.tools)
        return self._apart


def _shared(text: str, other: str) -> int:
    """Characters with which both begin."""
    length = min(len(text), len(other))
    return next((at for at in range(length) if text[at] != other[at]), length)
