"""Preference rows: one prompt and two answers to it, as data sets write them.

The prompt is a column of its own, as text or as turns, or the common beginning of two whole conversations or texts.
Nothing is guessed: a row that can be read in two ways is refused.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsft.data.records import RowError, kind
from dsft.data.turns import Turns, concatenated, exchange, read_turns

PROMPTS = ("prompt", "question", "instruction", "messages", "conversations")
"""Columns that may hold the prompt, in the order in which they are looked for."""

_MARK = "\n\nAssistant:"
_HUMAN = "\n\nHuman:"
"""How the texts of Anthropic's data sets open turns."""

_REPEATED = 5
"""Words of a prompt from which on two answers that begin with it are taken for whole texts."""


class Side(NamedTuple):
    """A side holds one answer behind its prompt, which is the first so many turns.

    plain: (given, learned) for text, None if it makes no sense without a template.
    """

    turns: Turns
    plain: tuple[str, str] | None
    prompt: int = 0


class _Given(NamedTuple):
    """The prompt of a row. joint: what stands behind it where there is no chat template."""

    said: Turns | str
    column: str
    joint: str = ""


def read_sides(values: Mapping[str, Any], place: str, ignore: frozenset[str]) -> tuple[Side, Side]:
    """The chosen and the rejected answer, each behind the prompt, of which no turn is supervised. Raises RowError."""
    sides = [_answer(values[name], place, name, ignore) for name in ("chosen", "rejected")]
    given = _given(values, place, ignore)
    chosen, rejected = sides
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _texts(given, chosen, rejected, place)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError(
            f"{place} must have chosen and rejected as text both, or as turns both, got {kind(values['chosen'])} and "
            f"{kind(values['rejected'])}; write both alike"
        )
    whole = [turns.messages[0]["role"] not in ("assistant", "tool") for turns in (chosen, rejected)]
    if given is None or given.said == "" or all(whole):
        return _conversations(None if given is None or given.said == "" else given, chosen, rejected, place)
    if any(whole):
        raise RowError(
            f"{place} must have chosen and rejected that both begin with the prompt, or neither, got one that does; "
            "correct the row"
        )
    asked = ({"role": "user", "content": given.said},)
    prompt = given.said if isinstance(given.said, Turns) else Turns(asked, (False,))
    return _side(prompt, chosen), _side(prompt, rejected)


def _answer(value: Any, place: str, column: str, ignore: frozenset[str]) -> Turns | str:
    if isinstance(value, str):
        written = _written_turns(value)
        if written is None:
            return value
        value = written
    return read_turns([value] if isinstance(value, dict) else value, place, column=column, ignore=ignore)


def _written_turns(text: str) -> list[Any] | None:
    """The turns that a csv or parquet file holds as JSON text; None for other text, which is an answer."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None  # an answer may begin with a bracket
    listed = isinstance(found, list) and len(found) > 0
    return found if listed and all(isinstance(t, dict) and t.keys() & {"role", "from"} for t in found) else None


def _given(values: Mapping[str, Any], place: str, ignore: frozenset[str]) -> _Given | None:
    """The prompt, None if the row has no column for it."""
    column = next((name for name in PROMPTS if values.get(name) is not None), None)
    if column is None and values.get("input"):
        raise RowError(
            f"{place} must have an input beside an instruction, got one alone; if it is the prompt set "
            "data.fields.prompt=input, or read the rows without it by data.ignore=[input]"
        )
    if column is None:
        return None
    value = values[column]
    if column != "instruction" and values.get("input") and values["input"] != value:
        raise RowError(
            f"{place} must have an input beside an instruction alone, got one beside the {column}; if it is the prompt "
            "set data.fields.prompt=input, or read the rows without it by data.ignore=[input]"
        )
    if column == "instruction" and isinstance(value, str) and values.get("input"):
        if not isinstance(values["input"], str):
            raise RowError(f"{place} must have text in the field input, got {kind(values['input'])}; correct the row")
        value = f"{value}\n\n{values['input']}"
    joint = "\n" if column in ("question", "instruction") else ""
    said = value if value == "" else _answer(value, place, column, ignore)
    return _Given(said if isinstance(said, str) else _unlearned(said), column, joint)


def _texts(given: _Given | None, chosen: str, rejected: str, place: str) -> tuple[Side, Side]:
    if given is None:
        return _whole_texts(chosen, rejected, place)
    if isinstance(given.said, Turns):
        answers = [Turns(({"role": "assistant", "content": said},), (True,)) for said in (chosen, rejected)]
        return _side(given.said, answers[0]), _side(given.said, answers[1])
    repeated = all(said.startswith(given.said) for said in (chosen, rejected))
    if repeated and len(given.said.split()) >= _REPEATED:
        raise RowError(
            f"{place} must have answers that go on from the {given.column}, got two that begin with it; if they are "
            f"whole texts read the rows without it by data.ignore=[{given.column}]"
        )
    prompt = given.said + given.joint
    first, second = (Side(exchange(given.said, said), (prompt, said), 1) for said in (chosen, rejected))
    return first, second


def _whole_texts(chosen: str, rejected: str, place: str) -> tuple[Side, Side]:
    r"""Two texts, parted behind their last common \n\nAssistant:, else at a border of words of what both begin with."""
    common = chosen[: _shared(chosen, rejected)]
    at = common.rfind(_MARK)
    if at >= 0:
        at += len(_MARK)
        if any(_HUMAN in text[at:] for text in (chosen, rejected)):
            raise RowError(
                f"{place} must have a chosen and a rejected text that differ in the last answer alone, got a question "
                "behind what both begin with; correct the row"
            )
    else:
        at = max(common.rfind(" "), common.rfind("\n") + 1)
    if at <= 0 or not common[:at].strip():
        raise RowError(
            f"{place} must have a prompt, or two texts that begin with it, got two that begin otherwise; name the "
            "prompt's column by data.fields.prompt=COLUMN, or correct the row"
        )
    none = Turns((), ())
    return Side(none, (chosen[:at], chosen[at:])), Side(none, (rejected[:at], rejected[at:]))


def _conversations(given: _Given | None, chosen: Turns, rejected: Turns, place: str) -> tuple[Side, Side]:
    """Two whole conversations, parted at their last common turn; given: the prompt that they begin with."""
    said = None if given is None else given.said
    if isinstance(said, Turns):
        at = len(said.messages)
        fits = all(each.messages[:at] == said.messages and len(each.messages) > at for each in (chosen, rejected))
    else:
        at = _parting(chosen, rejected, place)
        asked = [str(m["content"]).strip() for m in chosen.messages[:at] if m["role"] == "user"]
        fits = said is None or said.strip() in (asked[:1] + asked[-1:])
    if given is not None and not fits:
        raise RowError(
            f"{place} must have a chosen and a rejected conversation that begin with the {given.column}, or go on from "
            f"it, got others; correct the row, or read the conversations alone by data.ignore=[{given.column}]"
        )
    before = Turns(chosen.messages[:at], (False,) * at)
    first, second = (_side(before, Turns(each.messages[at:], each.learned[at:])) for each in (chosen, rejected))
    return first, second


def _parting(chosen: Turns, rejected: Turns, place: str) -> int:
    """The number of turns that both begin with; of two that are equal, those before the last answer."""
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    at = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    if at is None and len(chosen.messages) == len(rejected.messages):
        answers = [index for index, message in enumerate(chosen.messages) if message["role"] == "assistant"]
        at = answers[-1] if answers else 0
    at = min(len(chosen.messages), len(rejected.messages)) if at is None else at
    if at == 0:
        raise RowError(
            f"{place} must have a chosen and a rejected conversation with a common beginning, which is the prompt, got "
            "none; correct the row"
        )
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        role = turns.messages[at]["role"] if at < len(turns.messages) else "no"
        if role != "assistant":
            raise RowError(
                f"{place} must have an assistant turn in {name} behind the turns that both begin with, got {role} turn"
                f"{'' if role == 'no' else ' there'}; correct the row"
            )
    return at


def _side(prompt: Turns, answer: Turns) -> Side:
    return Side(concatenated([prompt, answer]), None, len(prompt.messages))


def _unlearned(turns: Turns) -> Turns:
    return turns._replace(learned=(False,) * len(turns.messages))


def _shared(one: str, other: str) -> int:
    """Characters with which both begin."""
    length = min(len(one), len(other))
    return next((at for at in range(length) if one[at] != other[at]), length)
