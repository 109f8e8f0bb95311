"""A chat template with marks in it: characters that no text holds, where a loop over the messages takes one up and
leaves it. The marked template is rendered like the other one, by transformers; each message carries its index in KEY.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from jinja2 import Environment

Span = tuple[int, int]

OPENS, CLOSES, NEVER = "\ufdd0", "\ufdd1", "\ufdd2"
"""Noncharacters of Unicode: no text that is meant for others holds them."""
KEY = "dsft_message"

_LEAVES = f"{{{{ '{OPENS}{CLOSES}' if {{0}}.open }}}}{{%+ set {{0}}.open = false +%}}"
_TAKES_UP = (
    f"{_LEAVES}{{%+ set {{0}}.open = {{1}} is mapping and '{KEY}' in {{1}} +%}}"
    f"{{{{ '{OPENS}' ~ {{1}}.{KEY} ~ '{CLOSES}' if {{0}}.open }}}}"
)
_BEFORE = "{%+ set {0} = namespace(open=false) +%}"


class CannotRenderError(Exception):
    """The template failed on some messages, or where it wrote them cannot be told. Its text is the reason, one line."""


@dataclass(frozen=True, slots=True)
class Traced:
    """text: the whole; blocks: for each message that a loop took up, the characters that were written meanwhile.

    last: end of the last block. unclear: messages that were written in several places, or with another one's text
    among their own.
    """

    text: str
    blocks: Mapping[int, Span]
    last: int
    unclear: frozenset[int]

    def block(self, index: int) -> str:
        """The characters of a message's block."""
        first, end = self.blocks[index]
        return self.text[first:end]


def with_marks(environment: Environment, source: str) -> str:
    """The template's source with marks around the body of each loop; white space control is settled on the way.

    A loop is left at the end of its body, or (`continue`, `break`) when it takes up its next item or has ended.
    """
    numbers = count()
    written: list[str] = []
    inside: list[tuple[str, str]] = []  # of the tags that may have an else: the loop's name where it is one
    for kind, text, words in _tags(environment, source):
        if kind != "tag":
            written.append(text)
            continue
        watch = inside[-1][1] if inside else ""
        if words[0] == "for" and words[2:3] == ["in"]:
            inside.append(("for", f"dsft_loop_{next(numbers)}"))
            name = inside[-1][1]
            written += [_filled(_BEFORE, name), text, _filled(_TAKES_UP, name, words[1])]
        elif words[0] in ("for", "if"):
            inside.append((words[0], ""))
            written.append(text)
        elif words[0] in ("endfor", "endif"):
            _, watch = inside.pop()
            leaves = _filled(_LEAVES, watch) if watch else ""
            written += [leaves, text, leaves]
        elif words[0] == "else" and watch:
            written += [_filled(_LEAVES, watch), text]
            inside[-1] = ("for", "")
        else:
            written.append(text)
    return "".join(written)


def _filled(form: str, *names: str) -> str:
    for index, name in enumerate(names):
        form = form.replace(f"{{{index}}}", name)
    return form


def _tags(environment: Environment, source: str) -> Iterator[tuple[str, str, list[str]]]:
    """(kind, text, words) of the pieces of a template; kind "tag": {% ... %}; the rest is data and {{ ... }}."""
    text, words, form = "", [""], "{{%+{}+%}}"
    for _, kind, value in environment.lex(source):
        if kind in ("block_begin", "variable_begin"):
            text, words, form = "", [], "{{%+{}+%}}" if kind == "block_begin" else "{{{{{}}}}}"
        elif kind == "block_end":
            yield "tag", form.format(text), words or [""]
        elif kind == "variable_end":
            yield "value", form.format(text), []
        elif kind == "data":  # quoted: a brace at its end must not join the one of a tag
            yield "data", f"{{{{ {json.dumps(value, ensure_ascii=False)} }}}}", []
        elif not kind.startswith(("comment", "raw")):
            text += value
            words += [value] if kind != "whitespace" else []


def read_marks(marked: str) -> Traced:
    """The text without marks, and the outermost blocks in it. Blocks of white space give way to one with text."""
    pieces = marked.split(OPENS)
    text, at = [pieces[0]], len(pieces[0])
    open_: list[tuple[int, int]] = []
    found: dict[int, list[Span]] = {}
    unclear: set[int] = set()
    for piece in pieces[1:]:
        mark, closed, rest = piece.partition(CLOSES)
        if not closed or not (mark.isdecimal() or (mark == "" and open_)):
            raise CannotRenderError("it takes apart what it wrote")
        if mark:
            open_.append((int(mark), at))
        else:
            index, first = open_.pop()
            if not open_:
                found.setdefault(index, []).append((first, at))
            elif open_[0][0] != index and "".join(text)[first:at].strip():
                unclear.add(open_[0][0])
        text.append(rest)
        at += len(rest)
    whole = "".join(text)
    if open_ or CLOSES in whole:
        raise CannotRenderError("it takes apart what it wrote")
    blocks = {}
    for index, spans in found.items():
        filled = [(first, end) for first, end in spans if whole[first:end].strip()]
        blocks[index] = (filled or spans)[-1]
        if len(filled) > 1:
            unclear.add(index)
    return Traced(whole, blocks, max((end for _, end in blocks.values()), default=0), frozenset(unclear))
