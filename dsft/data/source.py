"""What a source of rows gives: samples, held-out samples, an identity, a verdict on answers."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from dsft.objective import Wants


OnBadRow = Literal["stop", "skip"]
"""Values of data.on_bad_row: the first bad row ends the start, or bad rows are left out, counted and listed."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, its columns understood. source:row is its id; place is where a user finds it (file:line).

    messages: a conversation ({"role", "content"}, ...), empty for plain text. plain: (given, learned) for a tokenizer
    without a chat template, None if the row makes no sense without one. reference: the right answer.
    entry: what the source's score needs to judge an answer, JSON-able; None if answers cannot be judged.
    learned: for each message, whether it is supervised; None: every assistant turn is. tools: what the row offers the
    model to call, for a chat template that renders tools; None where it names none. unread: the row's columns that
    were not read. rejected: of a pair the worse answer to the same prompt, with the same source, row and place. prompt:
    messages with which both sides of a pair begin. columns: the row's numbers by name (label, margin, weight), without
    those that say no more than a row that has none.
    """

    source: str
    row: int
    place: str
    messages: tuple[dict[str, Any], ...]
    plain: tuple[str, str] | None
    reference: str
    entry: dict[str, Any] | None
    learned: tuple[bool, ...] | None = None
    tools: tuple[Any, ...] | None = None
    unread: tuple[str, ...] = ()
    prompt: int = 0
    rejected: "Sample | None" = None
    columns: Mapping[str, float] = field(default_factory=dict)

    @property
    def sides(self) -> "tuple[Sample, ...]":
        """What becomes a segment each: the row itself, or both answers of a pair, the better first."""
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def silent(self) -> bool:
        """True if no token of the row is to be supervised."""
        return self.learned is not None and not any(self.learned)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. reason: one line that names the place, what is wrong and the way out."""

    source: str
    row: int
    place: str
    reason: str


class Source(Protocol):
    """A frozen dataclass whose fields are its YAML keys.

    A field with a default may be absent from a YAML of the user's, as it is from one that is older than the field.
    dedup: whether a row is dropped that has the same tokens and mask as an earlier one. wants: the kind of rows that
    the run's objective takes; a source that has others refuses it.
    """

    shuffle: bool
    dedup: bool
    eval_fraction: float
    max_eval: int | None

    def check(self, wants: "Wants") -> None:
        """Raise ValueError for what is wrong and can be seen at little cost: no file, no row, no such task."""

    def identity(self) -> dict[str, Any]:
        """What decides the samples, JSON-able: content digests and keys, no machine's paths."""

    def rows(self, wants: "Wants") -> Iterator[Sample | BadRow]:
        """Training samples in file order, bad rows among them. Raises ValueError if there is no reading on."""

    def eval_rows(self, wants: "Wants") -> Iterator[Sample | BadRow] | None:
        """Held-out samples of their own, or None if the source brings none."""

    def skips(self, bad: BadRow) -> bool:
        """True if such a row of this source is to be left out and listed; else it ends the start."""

    def score(self, entry: dict[str, Any], reference: str, answer: str) -> float:
        """1.0 if answer is right by entry (a sample's, never None), else 0.0."""


def check_shared(eval_fraction: float, max_eval: int | None, *, own: str | None) -> None:
    """Raise ValueError for values out of range; own names the key that already holds rows out, if one does."""
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"data.eval_fraction must be in [0, 1), got {eval_fraction}")
    if max_eval is not None and max_eval < 1:
        raise ValueError(f"data.max_eval must be 1 or more, got {max_eval}; null uses all held-out rows")
    if own and eval_fraction > 0:
        raise ValueError(
            f"data.eval_fraction must be 0 where {own} holds rows out, got {eval_fraction}; give one of the two"
        )


def refuse_bad(rows: Iterable[Sample | BadRow], skips: Callable[[BadRow], bool]) -> Iterator[Sample]:
    """The samples among rows. Raises ValueError for the first bad row that is not skipped."""
    for row in rows:
        if isinstance(row, Sample):
            yield row
        elif not skips(row):
            raise ValueError(row.reason)


def held_out(sample: Sample | BadRow, *, seed: int, fraction: float) -> bool:
    """True for a fraction of all samples, told by (seed, id) alone: no other row changes the answer."""
    digest = hashlib.blake2b(f"{seed}/{sample.source}:{sample.row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def score_exact(reference: str, answer: str) -> float:
    """1.0 if answer equals reference once both are stripped, else 0.0."""
    return float(answer.strip() == reference.strip())
