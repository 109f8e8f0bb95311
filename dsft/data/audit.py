"""What became of the rows, and what the mask of one of them looks like."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

_SHOWN = 4000
"""Characters of the example that are kept."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """One set's rows: rows = kept + duplicates + over_long + zero_mask.

    duplicates: rows dropped because an earlier one has the same tokens and mask; over_long: dropped, longer than
    max_length; zero_mask: dropped, nothing in them but ends of turns is supervised. truncated: kept rows whose
    supervised part does not end with a special token, so that nothing teaches the model to stop. tokens, supervised:
    of the kept rows. shortest: tokens of the shortest row, kept or not.
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

    @property
    def share(self) -> float:
        """Supervised tokens of all tokens, 0..1."""
        return self.supervised / self.tokens if self.tokens else 0.0

    def check(self, what: str, max_length: int) -> None:
        """Raise ValueError if no row is left to use; what names the set for the reader."""
        if self.rows == 0:
            raise ValueError(f"{what} must hold at least one row, got none; change data.eval_fraction or the data")
        if self.kept == 0 and self.over_long:
            raise ValueError(
                f"train.max_length must be at least {self.shortest} for a row of {what} to fit, got {max_length}; "
                f"all {self.over_long} rows are longer: raise it or shorten the rows"
            )
        if self.supervised == 0:
            raise ValueError(
                f"{what} must supervise at least one token, got a loss mask of zeros in all {self.rows} rows, "
                "ends of turns aside; "
                "give the conversations assistant turns, or correct the chat template's {% generation %} part"
            )

    def line(self) -> str:
        """The counts in words."""
        return (
            f"{self.rows} rows, {self.kept} kept ({self.duplicates} duplicates, {self.over_long} over-long, "
            f"{self.zero_mask} without a supervised token dropped), {self.tokens} tokens, {self.supervised} supervised "
            f"({self.share:.1%}), {self.truncated} endings without an end-of-turn token"
        )


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Both sets' counts, their overlap (held-out rows equal to a row to learn from) and an example with its mask.

    example: consecutive pieces of the first kept row's text, each with whether it is supervised.
    """

    train: Counts
    eval: Counts | None
    overlap: int
    example: Sequence[tuple[str, bool]]

    def lines(self) -> list[str]:
        """The counts in words, one line per set."""
        lines = [f"train: {self.train.line()}"]
        if self.eval is not None:
            lines.append(f"eval: {self.eval.line()}, {self.overlap} also in train")
        return lines

    def coloured(self) -> Text:
        """The example: supervised text green, the rest dim."""
        text, left = Text(), _SHOWN
        for piece, supervised in self.example:
            text.append(piece[:left], style="green" if supervised else "dim")
            left -= len(piece[:left])
        return text if left else text.append(" ...", style="dim")
