"""From columns to samples: which format a row is in, and what of it is given, learned and right."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from dsft.data.files import Record
from dsft.data.source import Sample

Name = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "preference", "text"]
"""Values of data.format; auto = the first of them, in this order, whose columns the first row has."""

Content = tuple[tuple[dict[str, Any], ...], tuple[str, str] | None, str]
"""(messages, plain, reference) of a Sample."""

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """How rows are read: data.format, data.fields, data.system, data.verify."""

    format: Name
    fields: Mapping[str, str | None]
    system: str | None
    verify: Literal["none", "exact"]

    def __post_init__(self) -> None:
        """Refuse names that do not exist."""
        if self.format not in get_args(Name):
            raise ValueError(f"data.format must be one of {' '.join(get_args(Name))}, got {self.format}")
        if self.verify not in ("none", "exact"):
            raise ValueError(f"data.verify must be none or exact, got {self.verify}")
        known = sorted({column for layout in _LAYOUTS.values() for column in (*layout.columns, *layout.optional)})
        for name in self.fields:
            if name not in known:
                raise ValueError(
                    f"data.fields must rename some of {' '.join(known)}, got {name}; write our_name: your_name"
                )

    def identity(self) -> dict[str, Any]:
        """What decides the samples of given records, JSON-able."""
        return {"format": self.format, "fields": self._renamed(), "system": self.system, "verify": self.verify}

    def samples(self, records: Iterable[Record], source: str, *, path: str) -> Iterator[Sample]:
        """A sample per record of path. Raises ValueError naming the place of the first that does not fit the format."""
        layout: _Layout | None = None
        for record in records:
            values = self._rename(record)
            layout = layout or self._layout(values, record.place)
            _check_columns(values, layout, record.place)
            messages, plain, reference = layout.read(values, record.place)
            entry: dict[str, Any] | None = {} if self.verify == "exact" else None
            messages, plain = self._with_system(messages, plain)
            yield Sample(source, record.row, record.place, messages, plain, reference, entry)
        if layout is None:
            raise ValueError(f"data must hold at least one row, got none in {path}; write rows or name another")

    def _renamed(self) -> dict[str, str]:
        return {name: column for name, column in self.fields.items() if column is not None}

    def _rename(self, record: Record) -> dict[str, Any]:
        values = dict(record.values)
        for name, column in self._renamed().items():
            if column not in record.values:
                raise ValueError(
                    f"{record.place} must have the field {column} (data.fields.{name}), got {_names(values)}"
                )
            values[name] = record.values[column]
        return values

    def _layout(self, values: Mapping[str, Any], place: str) -> "_Layout":
        name = self.format
        if name == "auto":
            fitting = (name for name, layout in _LAYOUTS.items() if layout.fits(values, self._renamed()))
            name = next(fitting, "auto")  # type: ignore[arg-type]
        elif idle := sorted(set(self._renamed()) - {*_LAYOUTS[name].columns, *_LAYOUTS[name].optional}):
            raise ValueError(f"data.fields must rename fields of the format {name}, got {idle[0]}; unset it")
        if name == "auto":
            wanted = ", ".join("+".join(layout.columns) for layout in _LAYOUTS.values())
            raise ValueError(
                f"{place} must have the fields of a known format ({wanted}), got {_names(values)}; set data.fields"
            )
        if name == "preference":
            raise ValueError(
                f"data must be examples of one answer, got preference pairs (chosen, rejected) at {place}; "
                "to learn the chosen answers set data.format=prompt_completion data.fields={completion: chosen}"
            )
        if name == "text" and (self.system is not None or self.verify != "none"):
            raise ValueError(
                f"data.system and data.verify must be null and none for plain text, as {place} is; unset them"
            )
        return _LAYOUTS[name]

    def _with_system(
        self, messages: tuple[dict[str, Any], ...], plain: tuple[str, str] | None
    ) -> tuple[tuple[dict[str, Any], ...], tuple[str, str] | None]:
        if self.system is None:
            return messages, plain
        if messages[0]["role"] not in ("system", "developer"):
            messages = ({"role": "system", "content": self.system}, *messages)
        return messages, None


class _Layout(NamedTuple):
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    types: tuple[type, ...]
    read: Callable[[Mapping[str, Any], str], Content]

    def fits(self, values: Mapping[str, Any], renamed: Mapping[str, str]) -> bool:
        """True if a row has this format's columns, and none is renamed that this format would leave unread."""
        return set(self.columns) <= set(values) and set(renamed) <= {*self.columns, *self.optional}


def _read_messages(values: Mapping[str, Any], place: str) -> Content:
    messages = []
    for turn in values["messages"]:
        role, content = _turn(turn, "role", "content", place)
        if role not in _ROLES:
            raise ValueError(f"{place} must have messages of the roles {' '.join(_ROLES)}, got {role}")
        messages.append({**turn, "role": role, "content": content})
    return _conversation(messages, place)


def _read_sharegpt(values: Mapping[str, Any], place: str) -> Content:
    messages = []
    for turn in values["conversations"]:
        speaker, content = _turn(turn, "from", "value", place)
        if speaker not in _SPEAKERS:
            raise ValueError(f"{place} must have conversations from {' '.join(_SPEAKERS)}, got {speaker}")
        messages.append({"role": _SPEAKERS[speaker], "content": content})
    return _conversation(messages, place)


def _read_alpaca(values: Mapping[str, Any], place: str) -> Content:
    given = values.get("input")
    if given is not None and not isinstance(given, str):
        raise ValueError(f"{place} must have text in the field input, got {type(given).__name__}")
    prompt = f"{values['instruction']}\n\n{given}" if given else values["instruction"]
    return _exchange(prompt, values["output"], "\n")


def _read_completion(values: Mapping[str, Any], place: str) -> Content:
    return _exchange(values["prompt"], values["completion"], "")


def _read_question(values: Mapping[str, Any], place: str) -> Content:
    return _exchange(values["question"], values["answer"], "\n")


def _read_text(values: Mapping[str, Any], place: str) -> Content:
    return (), ("", values["text"]), ""


def _read_pair(values: Mapping[str, Any], place: str) -> Content:
    raise AssertionError("preference rows are refused before they are read")


_LAYOUTS: dict[str, _Layout] = {
    "messages": _Layout(("messages",), (), (list,), _read_messages),
    "sharegpt": _Layout(("conversations",), (), (list,), _read_sharegpt),
    "preference": _Layout(("chosen", "rejected"), ("prompt",), (str, list), _read_pair),
    "alpaca": _Layout(("instruction", "output"), ("input",), (str,), _read_alpaca),
    "prompt_completion": _Layout(("prompt", "completion"), (), (str,), _read_completion),
    "question_answer": _Layout(("question", "answer"), (), (str,), _read_question),
    "text": _Layout(("text",), (), (str,), _read_text),
}


def _exchange(prompt: str, completion: str, joint: str) -> Content:
    """One question and its answer; joint stands between them where there is no chat template."""
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return messages, (prompt + joint, completion), completion


def _conversation(messages: list[dict[str, Any]], place: str) -> Content:
    if not messages:
        raise ValueError(f"{place} must hold at least one turn, got an empty conversation; drop the row")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return tuple(messages), None, answers[-1] if answers else ""


def _turn(turn: Any, speaker: str, content: str, place: str) -> tuple[str, str]:
    if not isinstance(turn, dict) or speaker not in turn or content not in turn:
        got = _names(turn) if isinstance(turn, dict) else type(turn).__name__
        raise ValueError(
            f"{place} must have turns with {speaker} and {content}, got {got}; set data.format and data.fields"
        )
    for key in (speaker, content):
        if not isinstance(turn[key], str):
            raise ValueError(f"{place} must have text in each turn's {key}, got {type(turn[key]).__name__}")
    return turn[speaker], turn[content]


def _check_columns(values: Mapping[str, Any], layout: _Layout, place: str) -> None:
    for column in layout.columns:
        if column not in values:
            raise ValueError(
                f"{place} must have the field {column}, got {_names(values)}; set data.fields or correct the row"
            )
        if not isinstance(values[column], layout.types):
            want = "a list" if list in layout.types else "text"
            raise ValueError(f"{place} must have {want} in the field {column}, got {type(values[column]).__name__}")


def _names(values: Mapping[str, Any]) -> str:
    return "the fields " + ", ".join(map(str, values)) if values else "no field"
