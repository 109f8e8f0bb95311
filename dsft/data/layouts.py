"""The formats of rows: which columns each has, and how they become turns or text."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from dsft.data.numbers import finite, verdict
from dsft.data.preference import PROMPTS, Side, read_sides
from dsft.data.records import RowError, field_names, kind
from dsft.data.turns import Turns, concatenated, exchange, json_text, only_last, read_turns

if TYPE_CHECKING:
    from dsft.objective import Wants


class Read(NamedTuple):
    """A row that has been read. plain: (given, learned) for a tokenizer without a chat template, None if it cannot be.

    sides: the answers of a pair, of which turns and plain are the first. columns: the row's numbers by name.
    """

    turns: Turns
    plain: tuple[str, str] | None
    sides: tuple[Side, Side] | None = None
    columns: Mapping[str, float] = MappingProxyType({})


class Layout(NamedTuple):
    """A layout is one format of rows.

    wants: the kind of its rows. columns: must be there, of one of types; optional: are read where they are there;
    either: one of them must be there.
    """

    wants: "Wants"
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    types: tuple[type, ...]
    read: Callable[[Mapping[str, Any], str, frozenset[str]], Read]
    either: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Return all columns that this format reads."""
        return (*self.columns, *self.either, *self.optional)

    def fits(self, values: Mapping[str, Any], renamed: Mapping[str, str]) -> bool:
        """True if a row has this format's columns, and none is renamed that this format would leave unread."""
        there = set(self.columns) <= set(values) and (not self.either or bool(set(self.either) & set(values)))
        return there and set(renamed) <= set(self.names)

    def check(self, values: Mapping[str, Any], place: str) -> None:
        """Raise RowError if a column is missing or of another type."""
        for column in self.columns:
            value = values.get(column)
            if column not in values:
                raise RowError(
                    f"{place} must have the field {column}, got {field_names(dict(values))}; set data.fields or "
                    "correct the row"
                )
            if not isinstance(value, self.types):
                want = "text" if str in self.types else "a list"
                rows = " (pandas: to_json(orient='records', lines=True))" if isinstance(value, dict) else ""
                raise RowError(
                    f"{place} must have {want} in the field {column}, got {kind(value)}; correct the row{rows}"
                )


def _read_messages(values: Mapping[str, Any], place: str, ignore: frozenset[str]) -> Read:
    return Read(read_turns(values["messages"], place, column="messages", ignore=ignore), None)


def _read_sharegpt(values: Mapping[str, Any], place: str, ignore: frozenset[str]) -> Read:
    return Read(read_turns(values["conversations"], place, column="conversations", ignore=ignore), None)


def _read_alpaca(values: Mapping[str, Any], place: str, ignore: frozenset[str]) -> Read:
    given = values.get("input")
    if given is not None and not isinstance(given, str):
        raise RowError(f"{place} must have text in the field input, got {kind(given)}; correct the row")
    prompt = f"{values['instruction']}\n\n{given}" if given else values["instruction"]
    last = _exchange(prompt, values["output"], "\n")
    earlier = _history(values.get("history"), place)
    return Read(concatenated([*earlier, last.turns]), None) if earlier else last


def _read_completion(values: Mapping[str, Any], place: str, ignore: frozenset[str]) -> Read:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _exchange(prompt, completion, "")
    if isinstance(prompt, str) or isinstance(completion, str):
        raise RowError(
            f"{place} must have prompt and completion as text both, or as lists of turns both, got {kind(prompt)} and "
            f"{kind(completion)}; write both alike"
        )
    given, learned = (
        read_turns(turns, place, column=name, ignore=ignore)
        for name, turns in (("prompt", prompt), ("completion", completion))
    )
    if learned.messages[: len(given.messages)] == given.messages:
        raise RowError(
            f"{place} must have a completion that goes on from the prompt, got one that begins with it; read it alone "
            "by data.format=messages data.fields.messages=COLUMN, the column of the completion"
        )
    if all(message["role"] != "assistant" for message in learned.messages):
        raise RowError(f"{place} must have an assistant turn in the completion, got none; correct the row")
    given = given._replace(learned=(False,) * len(given.messages))
    return Read(concatenated([given, learned]), None)


def _read_question(values: Mapping[str, Any], place: str, ignore: frozenset[str]) -> Read:
    return _exchange(values["question"], values["answer"], "\n")


def _read_text(values: Mapping[str, Any], place: str, ignore: frozenset[str]) -> Read:
    return Read(Turns((), ()), ("", values["text"]))


def _read_pair(values: Mapping[str, Any], place: str, ignore: frozenset[str]) -> Read:
    chosen, rejected = read_sides(values, place, ignore)
    margin = finite(values.get("margin"), place, "margin", absent=0.0)
    return Read(chosen.turns, chosen.plain, (chosen, rejected), {"margin": margin} if margin else {})


def _read_rated(values: Mapping[str, Any], place: str, ignore: frozenset[str]) -> Read:
    """A completion of a prompt, or the last turn of a conversation, and the verdict on it."""
    column = next((name for name in ("completion", "messages", "conversations") if values.get(name) is not None), "")
    if column in ("messages", "conversations"):
        turns = read_turns(values[column], place, column=column, ignore=ignore)
        if turns.messages[-1]["role"] != "assistant":
            raise RowError(
                f"{place} must end with the assistant turn that the label is a verdict on, got a turn of the role "
                f"{turns.messages[-1]['role']}; correct the row"
            )
        found = Read(only_last(turns), None)
    else:
        both = {name: values.get(name) for name in ("prompt", "completion")}
        found = _read_completion(both, place, ignore)
    return found._replace(columns={"label": verdict(values["label"], place)})


def _read_labelled(values: Mapping[str, Any], place: str, ignore: frozenset[str]) -> Read:
    """A text or a conversation of which nothing is learned; its label is read by data.labels."""
    column = next((name for name in ("messages", "conversations", "text") if values.get(name) is not None), "text")
    value = values.get(column)
    if column == "text":
        if not isinstance(value, str):
            raise RowError(
                f"{place} must have text in the field text, or a list in messages, got {kind(value)}; correct the row"
            )
        if not value.strip():
            raise RowError(f"{place} must have a text in the field text, got an empty one; correct the row")
        return Read(Turns((), ()), (value, ""))
    turns = read_turns(value, place, column=column, ignore=ignore)
    return Read(turns._replace(learned=(False,) * len(turns.messages)), None)


def _exchange(prompt: str, completion: str, joint: str) -> Read:
    """One question and its answer; joint stands between them where there is no chat template."""
    return Read(exchange(prompt, completion), (prompt + joint, completion))


def _history(value: Any, place: str) -> list[Turns]:
    """Earlier exchanges of an alpaca row: a list of [question, answer]."""
    pairs = json_text(value, place, "history")
    if pairs is None or pairs == "":
        return []
    if not isinstance(pairs, list):
        raise RowError(f"{place} must have a list of pairs in the field history, got {kind(pairs)}; correct the row")
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            got = f"a list of {len(pair)}" if isinstance(pair, list) else kind(pair)
            raise RowError(
                f"{place} must have pairs of texts [question, answer] in the field history, got {got}; correct the row"
            )
    return [exchange(*pair) for pair in pairs]


_CHAT = ("system", "tools")
_WEIGHED = (*_CHAT, "weight")

LAYOUTS: dict[str, Layout] = {
    "messages": Layout("text", ("messages",), _WEIGHED, (list,), _read_messages),
    "sharegpt": Layout("text", ("conversations",), _WEIGHED, (list,), _read_sharegpt),
    "alpaca": Layout("text", ("instruction", "output"), ("input", "history", *_WEIGHED), (str,), _read_alpaca),
    "prompt_completion": Layout("text", ("prompt", "completion"), _WEIGHED, (str, list), _read_completion),
    "question_answer": Layout("text", ("question", "answer"), _WEIGHED, (str,), _read_question),
    "text": Layout("text", ("text",), ("weight",), (str,), _read_text),
    "rated": Layout(
        "rated", ("label",), ("prompt", *_CHAT), (object,), _read_rated, ("completion", "messages", "conversations")
    ),
    "labelled": Layout(
        "labelled", ("label",), _WEIGHED, (object,), _read_labelled, ("messages", "conversations", "text")
    ),
    "preference": Layout(
        "pair", ("chosen", "rejected"), (*PROMPTS, "input", "margin", *_CHAT), (str, list, dict), _read_pair
    ),
}

OPTIONAL = frozenset(name for layout in LAYOUTS.values() for name in layout.optional) - frozenset(
    name for layout in LAYOUTS.values() for name in (*layout.columns, *layout.either)
)
"""Names of columns that any row may lack."""

TURNS = (("messages",), ("conversations",))
"""Columns of the formats whose rows are several turns."""
