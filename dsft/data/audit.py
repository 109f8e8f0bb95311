"""What became of the rows, and what the mask of one of them looks like."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from dsft_launchers.shown import shown
from rich.console import Console
from rich.text import Text

from dsft.data.skipped import NAME

_SHOWN = 4000
"""Characters of the example that are kept."""

MARGIN = "| "
"""Before each line of the example."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The counts of one set's rows: rows = kept + duplicates + over_long + zero_mask + bad + those with a default.

    duplicates: rows dropped because an earlier one has the same tokens and mask; over_long: dropped, longer than
    max_length; zero_mask: dropped, nothing in them but ends of turns is supervised; bad: left out because they could
    not be read or rendered. truncated: kept rows whose supervised part does not end with a special token, so that
    nothing teaches the model to stop. tokens, supervised: of the kept rows. shortest: tokens of the shortest row, kept
    or not; of one that was too long to be tokenised, what it has at least. empty_turns: supervised turns of the kept
    rows that render to nothing but their end. equal_sides: pairs dropped because both answers are the same tokens;
    empty_sides: because nothing in one of their answers is supervised but ends of turns. zero_weight: left out because
    their weight is 0.
    """

    rows: int
    kept: int
    duplicates: int
    over_long: int
    zero_mask: int
    truncated: int
    tokens: int
    supervised: int
    shortest: int
    bad: int
    empty_turns: int
    equal_sides: int = 0
    empty_sides: int = 0
    zero_weight: int = 0

    @property
    def share(self) -> float:
        """Supervised tokens of all tokens, 0..1."""
        return self.supervised / self.tokens if self.tokens else 0.0

    def stored(self) -> dict[str, int]:
        """The counts for a file: those that only some kinds of rows have where they are not 0."""
        some = {field.name for field in fields(self) if field.default == 0}
        return {name: count for name, count in asdict(self).items() if count or name not in some}

    def check(self, what: str, max_length: int, first_bad: str) -> None:
        """Raise ValueError if no row is left to use. what names the set; first_bad: the first bad row's reason."""
        if self.rows == 0:
            raise ValueError(f"{what} must hold at least one row, got none; change data.eval_fraction or the data")
        if self.bad == self.rows:
            raise ValueError(
                f"{what} must hold a row that can be used, got {self.rows} bad ones, the first: {first_bad}"
            )
        if self.kept == 0 and self.over_long:
            raise ValueError(
                f"train.max_length must be at least {self.shortest} for a row of {what} to fit, got {max_length}; "
                f"all {self.over_long} rows are longer: raise it or shorten the rows"
            )
        if self.kept == 0 and self.equal_sides + self.empty_sides:
            raise ValueError(
                f"{what} must hold a pair of two different answers, got {self.equal_sides} pairs with two equal and "
                f"{self.empty_sides} with an empty one; correct the rows"
            )
        if self.kept == 0:
            raise ValueError(
                f"{what} must supervise at least one token, got a loss mask of zeros in all {self.rows} rows, "
                "ends of turns aside; "
                "give the conversations assistant turns, or correct the chat template's {% generation %} part"
            )

    def line(self) -> str:
        """The counts in words."""
        dropped = {
            "bad": self.bad,
            "over-long": self.over_long,
            "without a supervised token": self.zero_mask,
            "with two equal answers": self.equal_sides,
            "with an empty answer": self.empty_sides,
            "of weight 0": self.zero_weight,
            "duplicates" if self.duplicates > 1 else "duplicate": self.duplicates,
        }
        why = ", ".join(f"{count} {name}" for name, count in dropped.items() if count)
        line = f"{self.rows} rows, {f'{self.kept} kept ({why} dropped)' if why else 'all kept'}, {self.tokens} tokens"
        if not self.supervised:
            return line
        ends = "all answers end with an end-of-turn token"
        if self.truncated:
            some = "answers end" if self.truncated > 1 else "answer ends"
            ends = f"{self.truncated} {some} without an end-of-turn token"
        return f"{line}, {self.supervised} supervised ({self.share:.1%}), {ends}"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Both sets' counts, their overlap (held-out rows equal to a row to learn from) and an example with its mask.

    segments: of the first kept row (of a pair two) consecutive pieces of text, each with whether it is supervised.
    lengths: tokens per segment of a pair. facts: lines about rows of this kind. unread: columns that some row has and
    nothing reads.
    """

    train: Counts
    eval: Counts | None
    overlap: int
    segments: Sequence[Sequence[tuple[str, bool]]]
    lengths: Sequence[int]
    facts: Sequence[str]
    unread: Sequence[str]

    def lines(self) -> list[str]:
        """The counts in words, one line per set, and what a person should see before the run begins."""
        lines = [f"train: {self.train.line()}"]
        if self.eval is not None:
            lines.append(f"eval: {self.eval.line()}, {self.overlap} also in train")
        sets = [counts for counts in (self.train, self.eval) if counts is not None]
        if any(counts.rows > counts.kept + counts.duplicates for counts in sets):
            lines.append(f"rows that are not learned from, and why: {NAME} in the run folder (duplicates aside)")
        if empty := sum(counts.empty_turns for counts in sets):
            turns = "supervised turn renders" if empty == 1 else "supervised turns render"
            lines.append(
                f"warning: {empty} {turns} to nothing but an end of turn: the model learns to say nothing there; does "
                "the chat template write tool calls?"
            )
        lines += self.facts
        if self.unread:
            lines.append(f"columns not read: {', '.join(name or '(without a name)' for name in self.unread)}")
        return lines

    @property
    def heading(self) -> str:
        """Return the line that the audit prints above the example."""
        if self.lengths:
            return "an example, the chosen answer in green, the rejected one in red:"
        return "an example, what is supervised in green:" if self.train.supervised else "an example:"

    def coloured(self, width: int | None = None) -> Text:
        """The example: supervised text green, the rest dim, behind a margin, so that no line of it looks like ours.

        A pair has its prompt once, then both answers, the rejected one in red, each below its length in tokens. width:
        columns of a terminal, in which long lines are broken; None: of a log, in which they are not.
        """
        if not self.lengths:
            return _block(self.segments[0], "green", width)
        blocks = [_block(self.segments[0][:1], "green", width)]
        for name, style, pieces, length in zip(
            ("chosen", "rejected"), ("green", "red"), self.segments, self.lengths, strict=True
        ):
            blocks += [Text(f"{name}, {length} tokens with the prompt:"), _block(pieces[1:], style, width)]
        return Text("\n").join(blocks)


def _block(pieces: Sequence[tuple[str, bool]], style: str, width: int | None) -> Text:
    text, left = Text(), _SHOWN
    for piece, supervised in pieces:
        text.append(shown(piece[:left]), style=style if supervised else "dim")
        left -= len(piece[:left])
    text = text if left else text.append(" ...", style="dim")
    lines = text.split("\n", allow_blank=True) if width is None else text.wrap(Console(), width - len(MARGIN))
    return Text("\n").join(Text.assemble(MARGIN, line) for line in lines)
