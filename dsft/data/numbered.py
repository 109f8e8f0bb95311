"""Where in a conversation's text the turns say what they say: it is rendered once more with numbers in the contents.

A template may write its messages from a list of its own, or what one turn says within another one's. The numbers show
where each content went, whatever the template did on the way. They count only where the text is, without them, the
conversation's own.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsft.data.marks import NEVER, CannotRenderError

Message = Mapping[str, Any]
Places = Mapping[int, Sequence[int]]
"""For each message: the characters of the text before which its numbers stand, in order, none if it is left out.

A message whose number changes what the template writes is not among them, nor one that says nothing.
"""

NUMBER = re.compile(f"{NEVER}([0-9]+){NEVER}")


def numbered(index: int, message: Message, *, before: bool = True, behind: bool = True) -> Message:
    """The message with its number before and behind what it says; white space around that stays outside.

    A content without anything to read stays as it is: a template may refuse such a turn with something in it.
    """
    said, number = message.get("content"), f"{NEVER}{index}{NEVER}"
    if not isinstance(said, str) or not (core := said.strip()):
        return message
    first = said.index(core)
    marked = (number if before else "") + core + (number if behind else "")
    return {**message, "content": said[:first] + marked + said[first + len(core) :]}


def places(text: str, messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> Places:
    """Where text, of messages, holds their contents, as far as the template writes the same with numbers in them."""
    every = [numbered(*each) for each in enumerate(messages)]
    found = _found(text, every, render)
    if found is not None:
        return {i: found.get(i, ()) for i, message in enumerate(messages) if every[i] is not message}
    # A template may look at how a content begins or ends: one message at a time, with fewer numbers.
    told = {}
    for i, message in enumerate(messages):
        for before, behind in ((True, True), (False, True), (True, False)):
            tried = numbered(i, message, before=before, behind=behind)
            if tried is message:
                break
            found = _found(text, [*messages[:i], tried, *messages[i + 1 :]], render)
            if found is not None:
                told[i] = found.get(i, ())
                break
    return told


def _found(text: str, messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> Places | None:
    try:
        written = render(messages)
    except CannotRenderError:
        return None
    if NUMBER.sub("", written) != text:
        return None
    found: dict[int, list[int]] = {}
    numbers = 0  # characters of the numbers so far
    for match in NUMBER.finditer(written):
        found.setdefault(int(match[1]), []).append(match.start() - numbers)
        numbers += len(match[0])
    return found
