"""From columns to samples: which format a row is in, and what of it is given, learned and right."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, get_args

from dsft.data.json_rows import row_list
from dsft.data.kinds import KINDS, other_kind
from dsft.data.layouts import LAYOUTS, OPTIONAL, TURNS, Layout
from dsft.data.meaning import BESIDE_ONE_PROMPT, COLUMNS, refuse_unread
from dsft.data.numbers import class_of, is_name, unlisted, weight
from dsft.data.preference import PROMPTS, Side
from dsft.data.records import Record, RowError, field_names, kind
from dsft.data.source import BadRow, OnBadRow, Sample
from dsft.data.turns import Turns, json_text, only_last, read_tools

if TYPE_CHECKING:
    from dsft.objective import Wants

Name = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text", "preference", "rated",
    "labelled",
]  # fmt: skip
"""Values of data.format; auto = the first of those that the objective takes whose columns the first row has."""

TrainOn = Literal["all", "last"]
"""Values of data.train_on: which assistant turns are supervised, as far as the row's own marks let them be."""

_SKIP = ", or leave such rows out with data.on_bad_row=skip"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """How rows are read: the keys of the same names below data."""

    format: Name
    fields: Mapping[str, str | None]
    system: str | None
    verify: Literal["none", "exact"]
    train_on: TrainOn
    ignore: tuple[str, ...]
    on_bad_row: OnBadRow
    labels: tuple[str, ...] | None

    def __post_init__(self) -> None:
        """Refuse names that do not exist."""
        if self.format not in get_args(Name):
            raise ValueError(f"data.format must be one of {' '.join(get_args(Name))}, got {self.format}")
        if self.verify not in ("none", "exact"):
            raise ValueError(f"data.verify must be none or exact, got {self.verify}")
        if self.train_on not in get_args(TrainOn):
            raise ValueError(f"data.train_on must be all or last, got {self.train_on}")
        if self.on_bad_row not in get_args(OnBadRow):
            raise ValueError(f"data.on_bad_row must be stop or skip, got {self.on_bad_row}")
        if self.labels is not None and len({*self.labels}) < max(2, len(self.labels)):
            raise ValueError(
                f"data.labels must list two labels or more, each once, got {' '.join(self.labels) or 'none'}"
            )
        known = sorted({column for layout in LAYOUTS.values() for column in layout.names})
        for name, column in self.fields.items():
            if name not in known:
                raise ValueError(
                    f"data.fields must rename some of {' '.join(known)}, got {name}; write our_name: your_name"
                )
            if column is not None and column in self.ignore:
                raise ValueError(
                    f"data.ignore must name columns that are not read, got {column}, which data.fields.{name} "
                    "reads; remove it from one of the two"
                )

    def identity(self) -> dict[str, Any]:
        """Return what decides the samples of given records, JSON-able; keys that came later only where they are set."""
        found = {"format": self.format, "fields": self._renamed, "system": self.system, "verify": self.verify}
        labels = None if self.labels is None else list(self.labels)
        later: dict[str, tuple[Any, Any]] = {
            "train_on": (self.train_on, "all"),
            "on_bad_row": (self.on_bad_row, "stop"),
        }
        later["labels"] = (labels, None)
        found |= {key: value for key, (value, default) in later.items() if value != default}
        return found | ({"ignore": sorted(self.ignore)} if self.ignore else {})

    def samples(
        self, records: Iterable[Record], source: str, *, wants: "Wants", path: str, elsewhere: Iterable[Record] = ()
    ) -> Iterator[Sample | BadRow]:
        """A sample per record of path, a BadRow where it does not fit the format.

        wants: the kind of rows that the objective takes. elsewhere: further records, in which a name of data.ignore may
        stand that none of these has. Raises ValueError for what no other row could mend: no row at all, rows of another
        kind, a key that does not go with the format.
        """
        plan: _Plan | None = None
        idle, rows, absent = set(self.ignore), 0, {self._renamed[name] for name in self._renamed.keys() & OPTIONAL}
        records = iter(records)
        for record in records:
            rows, absent = rows + 1, absent - record.values.keys()
            item: Sample | BadRow
            try:
                values = self._values(record)
                if idle:
                    idle -= set(record.values) | _turn_keys(values)
                plan = plan or _Plan(self._layout(values, record.place, wants), self._renamed, self.ignore)
                if plan.layout.wants == "labelled" and self.labels is None and is_name(values.get("label")):
                    column = plan.named("label")
                    raise unlisted((each.values.get(column) for each in chain([record], records)), path)
                item = self._sample(record, values, plan, source)
            except RowError as error:
                hint = _SKIP if self.on_bad_row == "stop" else ""
                item = BadRow(source, record.row, record.place, f"{error}{hint}")
            yield item
        if not rows:
            raise ValueError(f"data must hold at least one row, got none in {path}; write rows or name another")
        if absent:
            raise ValueError(
                f"data.fields must name columns that some row has, got {min(absent)}, which none in {path} has; "
                "correct or unset it"
            )
        for record in elsewhere if idle else ():
            idle -= set(record.values) | _turn_keys(record.values)
        if idle:
            raise ValueError(
                f"data.ignore must name columns that some row has, got {min(idle)}, which none in {path} has; remove it"
            )

    def _sample(self, record: Record, values: dict[str, Any], plan: "_Plan", source: str) -> Sample:
        place, layout = record.place, plan.layout
        layout.check(values, place)
        refuse_unread(record.values, plan.known, place, read=plan.allowed, what="column")
        found = layout.read(values, place, plan.ignore)
        tools = read_tools(values["tools"], place) if "tools" in layout.optional and "tools" in values else None
        sides = found.sides or [Side(found.turns, found.plain)]
        system = values.get("system") if "system" in layout.optional else None
        samples = [self._side(self._with_system(side, system, place), record, source, tools) for side in sides]
        rejected = samples[1] if len(samples) > 1 else None
        columns = {**found.columns}
        if layout.wants == "labelled":
            columns["label"] = class_of(values["label"], self.labels, place)
            samples[0] = replace(samples[0], learned=(False,) * len(samples[0].messages))
        if "weight" in layout.optional and (counts := weight(values.get("weight"), place)) != 1:
            columns["weight"] = counts
        unread = plan.unread(tuple(record.values))
        return replace(samples[0], rejected=rejected, columns=columns, unread=unread)

    def _side(self, side: Side, record: Record, source: str, tools: tuple[Any, ...] | None) -> Sample:
        turns = only_last(side.turns) if self.train_on == "last" else side.turns
        roles = [message["role"] for message in turns.messages]
        answers = [message["content"] for message in turns.messages if message["role"] == "assistant"]
        return Sample(
            source=source,
            row=record.row,
            place=record.place,
            messages=turns.messages,
            plain=None if tools else side.plain,
            reference=answers[-1] if answers else "",
            entry={} if self.verify == "exact" else None,
            learned=None if turns.learned == tuple(role == "assistant" for role in roles) else turns.learned,
            tools=tools,
            prompt=side.prompt,
        )

    @cached_property
    def _renamed(self) -> dict[str, str]:
        return {name: column for name, column in self.fields.items() if column is not None}

    def _values(self, record: Record) -> dict[str, Any]:
        """The row's values by our names, without the ignored ones. Raises RowError."""
        if record.fault:
            raise RowError(record.fault)
        values = {name: value for name, value in record.values.items() if name not in self.ignore}
        for name, column in self._renamed.items():
            if column not in record.values and name in OPTIONAL:
                continue
            if column not in record.values:
                raise RowError(
                    f"{record.place} must have the field {column} (data.fields.{name}), got {field_names(values)}; "
                    "correct data.fields or the row"
                )
            values[name] = record.values[column]
        for name in ("messages", "conversations"):
            if isinstance(values.get(name), str):
                values[name] = json_text(values[name], record.place, name)
        return values

    def _layout(self, values: Mapping[str, Any], place: str, wants: "Wants") -> Layout:
        """The format of the rows, told by the first of them or by data.format. Raises ValueError if it is none."""
        if self.format != "auto":
            found = LAYOUTS[self.format]
            if idle := sorted(set(self._renamed) - set(found.names)):
                raise ValueError(f"data.fields must rename fields of the format {self.format}, got {idle[0]}; unset it")
        else:
            fitting = [layout for layout in LAYOUTS.values() if layout.fits(values, self._renamed)]
            if not fitting:
                raise RowError(_unknown(values, place, wants))
            found = next((layout for layout in fitting if layout.wants == wants), fitting[-1])
        if found.wants != wants:
            raise other_kind(wants, found.wants, f"at {place}", _one_side(values) if wants == "text" else "")
        self._refuse_idle(found, place)
        return found

    def _refuse_idle(self, layout: Layout, place: str) -> None:
        """Raise ValueError for a key that has no effect on rows of this format."""
        text, wants = layout is LAYOUTS["text"], layout.wants
        idle: dict[str, tuple[Any, Any, bool]] = {
            "system": (self.system, None, text),
            "verify": (self.verify, "none", text or wants != "text"),
            "train_on": (self.train_on, "all", text or wants == "labelled"),
            "labels": (self.labels, None, wants != "labelled"),
        }
        what = "plain text" if text else KINDS[wants].rows
        for key, (value, default, off) in idle.items():
            if off and value != default:
                shown = "null" if default is None else default
                got = " ".join(value) if isinstance(value, tuple) else value
                raise ValueError(f"data.{key} must be {shown} for {what}, as {place} is, got {got}; unset it")

    def _with_system(self, side: Side, given: Any, place: str) -> Side:
        """The side with its own system turn, that of its column system, or that of data.system, in this order."""
        messages, learned = side.turns
        if given is not None and not isinstance(given, str):
            raise RowError(f"{place} must have text in the field system, got {kind(given)}; correct the row")
        own = messages[0]["content"] if messages and messages[0]["role"] in ("system", "developer") else None
        if own is not None and given and given != own:
            raise RowError(
                f"{place} must have one system turn, got one in the turns and another in the field system; remove one "
                "of them, or read the rows without the field by data.ignore=[system]"
            )
        text = given or self.system
        if own is not None or text is None:
            return side
        if not messages:
            raise RowError(
                f"{place} must have turns, or a prompt of its own, for a system message to stand before, got text "
                "alone; unset data.system, or set data.ignore=[system]"
            )
        turns = Turns(({"role": "system", "content": text}, *messages), (False, *learned))
        return Side(turns, None, side.prompt + 1)


class _Plan:
    """How all rows of a file are read, once the format is known. allowed: known names that may stand there."""

    def __init__(self, layout: Layout, renamed: Mapping[str, str], ignore: Iterable[str]) -> None:
        self.layout, self.ignore = layout, frozenset(ignore)
        self.renamed = renamed
        self.taken = {self.named(name) for name in layout.names}
        chosen = {"rejected"} if "chosen" in self.taken else set()  # who reads the one leaves the other on purpose
        self.allowed = self.taken | self.ignore | chosen
        self.known = COLUMNS if layout.columns in TURNS else {**COLUMNS, **BESIDE_ONE_PROMPT}
        self.sorted: dict[tuple[str, ...], tuple[str, ...]] = {}

    def named(self, name: str) -> str:
        """The column that holds a field of ours."""
        return self.renamed.get(name, name)

    def unread(self, columns: tuple[str, ...]) -> tuple[str, ...]:
        """Return the columns that are not read, in the order of the file; found once for each set of columns."""
        if columns not in self.sorted:
            prompts = [name for name in map(self.named, PROMPTS) if name in columns and name not in self.ignore]
            taken = self.taken - (set(prompts[1:]) if self.layout.wants == "pair" else set()) - self.ignore
            self.sorted[columns] = tuple(name for name in columns if name not in taken)
        return self.sorted[columns]


def _turn_keys(values: Mapping[str, Any]) -> set[str]:
    lists = [value for value in values.values() if isinstance(value, list)]
    return {key for value in lists for turn in value if isinstance(turn, dict) for key in turn}


def _one_side(values: Mapping[str, Any]) -> str:
    """How the chosen answers of preference rows are read alone; empty for other rows."""
    if "chosen" not in values:
        return ""
    way = "data.format=prompt_completion data.fields={completion: chosen}"
    if isinstance(values["chosen"], list):
        way = "data.format=messages data.fields={messages: chosen}"
    return f"to learn the chosen answers alone set {way}"


def _unknown(values: Mapping[str, Any], place: str, wants: "Wants") -> str:
    layouts = [layout for layout in LAYOUTS.values() if layout.wants == wants]
    wanted = ", ".join("+".join(layout.columns) for layout in layouts) if wants == "text" else KINDS[wants].columns
    below, way = row_list(dict(values)), "set data.fields"
    if below and {"role", "from"} & values[below][0].keys():
        way = f"if {below} holds the turns, set data.fields.messages={below}"
    elif below and len(values) == 1:
        way = f"if {below} holds the rows, write that list alone"
    return f"{place} must have the fields of a known format ({wanted}), got {field_names(dict(values))}; {way}"
