"""The turns of a conversation: who speaks, what is said, which tools are called, and whether it is supervised."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from dsft.data.meaning import TURN_KEYS, refuse_unread
from dsft.data.records import RowError, field_names, kind

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that a Sample's messages have."""

_SPEAKERS = {
    **{role: role for role in ROLES},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("function", "function_response", "tool_response", "observation"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
"""What people call the speakers; call: an assistant's turn whose text is the call of a tool."""

_KEYS = (("role", "content"), ("from", "value"))

FLAGS = ("weight", "train", "loss")
"""Keys of a turn that say whether it is supervised: OpenAI's weight, axolotl's train, ms-swift's loss."""


TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a content that are text: of chats, and of OpenAI's responses."""

_NONE: frozenset[str] = frozenset()


class Turns(NamedTuple):
    """messages: {"role", "content", ...}; learned: for each, whether it is supervised."""

    messages: tuple[dict[str, Any], ...]
    learned: tuple[bool, ...]


def read_turns(turns: Any, place: str, *, column: str, ignore: Collection[str]) -> Turns:
    """The turns of a row's column. ignore: names of keys that are left out. Raises RowError."""
    turns = json_text(turns, place, column)
    if not isinstance(turns, list):
        raise RowError(f"{place} must have a list in the field {column}, got {kind(turns)}; write a list of turns")
    if not turns:
        raise RowError(f"{place} must hold at least one turn, got an empty conversation; drop the row")
    speaker, content = _keys(turns[0], column)
    messages, learned = [], []
    for turn in turns:
        if not isinstance(turn, dict) or speaker not in turn:
            got = field_names(turn)
            raise RowError(
                f"{place} must have turns with {speaker} and {content}, got {got}; name them role and content, or "
                "from and value, or set data.format and data.fields"
            )
        said = {key: value for key, value in turn.items() if value is not None and key not in ignore}
        refuse_unread(said, TURN_KEYS, place, read=_NONE, what="key of a turn")
        message = _message(said, speaker, content, place)
        learned.append(_supervised(said, message["role"], place))
        messages.append(message)
    return Turns(tuple(messages), tuple(learned))


def exchange(prompt: str, completion: str) -> Turns:
    """One question and its answer."""
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Turns(messages, (False, True))


def read_tools(value: Any, place: str) -> tuple[Any, ...] | None:
    """The tools that a row offers, as they are written; None if there are none. JSON text is read. Raises RowError."""
    tools = json_text(value, place, "tools", broken=True)
    tools = [tools] if isinstance(tools, dict) else tools
    if tools is None or tools == "" or tools == []:
        return None
    if isinstance(tools, list):
        tools = [json_text(tool, place, "tools", broken=True) for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        got = kind(tools) if not isinstance(tools, list) else "a list of other things"
        raise RowError(f"{place} must have a list of objects in the field tools, got {got}; correct the row")
    return tuple(tools)


def json_text(value: Any, place: str, column: str, *, broken: bool = False) -> Any:
    """A list or an object that csv and parquet hold as JSON text, as such; other values as they are.

    broken: text that is no JSON raises RowError; else it is given back.
    """
    if not isinstance(value, str) or not (broken or value.lstrip()[:1] in ("[", "{")) or not value.strip():
        return value.strip() if broken and isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep, or a number too long"
        raise RowError(
            f"{place} must have JSON in the field {column}, got text that is none: {reason}; write it with json.dumps"
        ) from None


def _keys(turn: Any, column: str) -> tuple[str, str]:
    """The keys by which a conversation's first turn names speaker and text, else those of the column's format."""
    pairs = _KEYS if column == "messages" else _KEYS[::-1]
    given = turn if isinstance(turn, dict) else {}
    return next((pair for pair in pairs if pair[0] in given), pairs[0])


def _message(said: Mapping[str, Any], speaker: str, content: str, place: str) -> dict[str, Any]:
    name = said.get(speaker)
    if not isinstance(name, str):
        raise RowError(f"{place} must have text in each turn's {speaker}, got {kind(name)}; correct the row")
    role = _SPEAKERS.get(name) or _SPEAKERS.get(name.strip().lower())
    if role is None:
        raise RowError(
            f"{place} must have {_field_of(speaker)} {' '.join(_SPEAKERS)}, got {name}; rename it in the rows"
        )
    rest = {key: value for key, value in said.items() if key not in (speaker, content, *FLAGS, "function_call")}
    calls = _calls(said, role, place)
    rest.pop("tool_calls", None)
    if role == "call":
        text, role = said.get(content), "assistant"
        called = _called(text)
        calls, text = (called, "") if called else (calls, _text(text, place, content, empty=bool(calls)))
    else:
        text = _text(said.get(content), place, content, empty=bool(calls))
    return {**rest, "role": role, "content": text, **({"tool_calls": calls} if calls else {})}


def _field_of(speaker: str) -> str:
    return "messages of the roles" if speaker == "role" else "conversations from"


def _text(value: Any, place: str, content: str, *, empty: bool) -> str:
    """A turn's text; parts of text are joined, and a turn that calls tools may have none."""
    if isinstance(value, str):
        return value
    if value is None and empty:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, place) for part in value)
    raise RowError(
        f"{place} must have text in each turn's {content}, got {kind(value)}; correct the row (a turn with tool_calls "
        "may leave it out)"
    )


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
        if marked := [key for key in FLAGS if part.get(key) is not None]:
            raise RowError(
                f"{place} must have no {marked[0]} in a part of a turn's content, which is supervised whole or not at "
                "all; write the parts as turns, or mark the turn"
            )
        return str(part["text"])
    got = str(part["type"]) if isinstance(part, dict) and "type" in part else kind(part)
    raise RowError(
        f"{place} must have parts of the type text in a turn's content, got {got}: only text is read; drop the row, or "
        "its other parts"
    )


def _calls(said: Mapping[str, Any], role: str, place: str) -> list[Any]:
    """The tools that a turn calls; OpenAI's older function_call is one of them."""
    calls = json_text(said.get("tool_calls"), place, "tool_calls") or []
    if function := said.get("function_call"):
        if calls or not isinstance(function, dict) or "name" not in function:
            raise RowError(
                f"{place} must have tool_calls, or a function_call with a name, in a turn, got {kind(function)}; "
                "write tool_calls alone"
            )
        calls = [{"type": "function", "function": function}]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{place} must have a list of objects in tool_calls, got {kind(calls)}; correct the row")
    if calls and role not in ("assistant", "call"):
        raise RowError(f"{place} must have tool_calls in assistant turns, got them in a {role} turn; correct the row")
    return calls


def _called(text: Any) -> list[Any]:
    """The calls that a sharegpt turn of function_call holds as JSON: {"name", "arguments"}, or a list of them."""
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return []  # the call in words of its own, which is then what the assistant says
    calls = found if isinstance(found, list) else [found]
    named = calls and all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls)
    return [{"type": "function", "function": call} for call in calls] if named else []


def _supervised(said: Mapping[str, Any], role: str, place: str) -> bool:
    """Whether a turn is learned: an assistant's is, unless one of FLAGS says 0; no other can be."""
    values = {key: _flag(key, said[key], place) for key in FLAGS if key in said}
    if len(set(values.values())) > 1:
        raise RowError(
            f"{place} must say once whether a turn is supervised, got {' and '.join(values)} that differ; correct the "
            f"row or read it without one of them by data.ignore=[{next(iter(values))}]"
        )
    asked = next(iter(values.values()), role == "assistant")
    if asked and role != "assistant":
        key = next(iter(values))
        raise RowError(
            f"{place} must supervise assistant turns alone, got {key}={said[key]} in a {role} turn; write 0 there, or "
            f"data.ignore=[{key}], which supervises every assistant turn"
        )
    return asked


def _flag(key: str, value: Any, place: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    shown = repr(value) if isinstance(value, int | float | str) and len(repr(value)) < 40 else kind(value)
    raise RowError(
        f"{place} must have 0 or 1 (or false, true) as a turn's {key}, got {shown}: turns are not weighted by other "
        f"values yet; correct it, or data.ignore=[{key}], which supervises every assistant turn"
    )


def only_last(turns: Turns) -> Turns:
    """The same turns, of which no assistant turn but the last is supervised."""
    answers = [index for index, message in enumerate(turns.messages) if message["role"] == "assistant"]
    last = answers[-1] if answers else -1
    return turns._replace(learned=tuple(on and index == last for index, on in enumerate(turns.learned)))


def concatenated(parts: Sequence[Turns]) -> Turns:
    """Turns end to end."""
    return Turns(
        tuple(message for part in parts for message in part.messages),
        tuple(on for part in parts for on in part.learned),
    )
