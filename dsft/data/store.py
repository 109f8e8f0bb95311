"""Writes a token set: rows are sorted out, counted, and laid end to end in the files that TokenSet maps."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsft.data.audit import Counts
from dsft.data.encoded import Encoded
from dsft.data.length import OverLong
from dsft.data.skipped import Skipped
from dsft.data.source import BadRow, Sample
from dsft.data.tokens import COLUMN, DEFAULTS


class SetWriter:
    """Takes the encoded rows of one set in order; keeps those that can be learned from and counts the others."""

    def __init__(
        self, *, max_length: int, limit: int | None, stop_tokens: frozenset[int], answers: bool, dedup: bool
    ) -> None:
        self.max_length = max_length
        self.limit = limit
        self.stop_tokens = stop_tokens
        self.dedup = dedup
        self.answers: list[str] | None = [] if answers else None
        self.seen: set[bytes] = set()
        self.kept: list[Encoded] = []
        self.ids: list[tuple[str, int]] = []
        self.columns: list[Mapping[str, float]] = []
        self.dropped = {"duplicates": 0, "over_long": 0, "zero_mask": 0, "bad": 0, "equal_sides": 0, "empty_sides": 0}
        self.dropped["zero_weight"] = 0
        self.skipped: list[Skipped] = []
        self.unread: dict[str, None] = {}
        self.empty_turns = 0
        self.rows = 0
        self.shortest = 0

    @property
    def full(self) -> bool:
        """True once limit rows are kept."""
        return self.limit is not None and len(self.kept) >= self.limit

    def add(self, sample: Sample | BadRow, encoded: Encoded | OverLong | BadRow) -> None:
        """Keep the row, or count why not; a full writer leaves it out and does not count it."""
        if self.full:
            return
        self.rows += 1
        if isinstance(sample, Sample):
            self.unread.update(dict.fromkeys(sample.unread))
        if isinstance(encoded, BadRow) or isinstance(sample, BadRow):
            bad = encoded if isinstance(encoded, BadRow) else sample
            self._drop("bad", bad, bad.reason if isinstance(bad, BadRow) else "")
        elif sample.columns.get("weight") == 0:
            self._drop("zero_weight", sample, "its weight is 0")
        elif isinstance(encoded, OverLong):
            self.shortest = min(self.shortest or encoded.tokens, encoded.tokens)
            why = f"{encoded.characters:,} characters are {encoded.tokens} tokens or more"
            self._drop("over_long", sample, f"{why}, more than train.max_length={self.max_length}")
        else:
            self._add(sample, encoded)

    def _drop(self, why: str, row: Sample | BadRow, reason: str) -> None:
        self.dropped[why] += 1
        self.skipped.append(Skipped(f"{row.source}:{row.row}", row.place, reason))

    def _add(self, sample: Sample, encoded: Encoded) -> None:
        length, parts = encoded.longest, encoded.parts
        self.shortest = min(self.shortest or length, length)
        whole = (
            encoded.tokens.tobytes()
            + encoded.mask.tobytes()
            + repr((encoded.segments, sorted(sample.columns.items()))).encode()
        )
        digest = hashlib.blake2b(whole, digest_size=16).digest()
        stops = list(self.stop_tokens)
        if length > self.max_length:
            what = "" if len(parts) == 1 else " of its longer side"
            self._drop("over_long", sample, f"{length} tokens{what}, more than train.max_length={self.max_length}")
        elif any(np.isin(tokens[mask], stops).all() for tokens, mask in parts) and not sample.silent:
            why, what = ("zero_mask", "it") if len(parts) == 1 else ("empty_sides", "one of its answers")
            self._drop(why, sample, f"no token of {what} is supervised, ends of turns aside")
        elif len(parts) > 1 and all(map(np.array_equal, *parts)):
            self._drop("equal_sides", sample, "the chosen and the rejected answer are the same tokens")
        elif self.dedup and digest in self.seen:
            self.dropped["duplicates"] += 1
        else:
            self.seen.add(digest)
            self.kept.append(encoded)
            self.empty_turns += encoded.empty_turns
            self.ids.append((sample.source, sample.row))
            self.columns.append(sample.columns)
            if self.answers is not None:
                asked = {} if encoded.asked is None else {"asked": encoded.asked}
                self.answers.append(json.dumps({"reference": sample.reference, "entry": sample.entry, **asked}))

    def counts(self) -> Counts:
        """What became of the rows so far."""
        last = [int(tokens[mask][-1]) for row in self.kept for tokens, mask in row.parts if mask.any()]
        return Counts(
            rows=self.rows,
            kept=len(self.kept),
            **self.dropped,
            truncated=sum(token not in self.stop_tokens for token in last),
            tokens=sum(len(row.tokens) for row in self.kept),
            supervised=sum(int(row.mask.sum()) for row in self.kept),
            shortest=self.shortest,
            empty_turns=self.empty_turns,
        )

    def check(self, what: str) -> None:
        """Raise ValueError if no row is left to use; what names the set for the reader."""
        bad = [row.reason for row in self.skipped] if self.dropped["bad"] == self.rows else []
        self.counts().check(what, self.max_length, bad[0] if bad else "")

    def write(self, folder: Path) -> None:
        """Write the set's files into folder, which must not exist."""
        folder.mkdir()
        names = sorted({source for source, _ in self.ids})
        index = {name: number for number, name in enumerate(names)}
        arrays = {
            "tokens": np.concatenate([row.tokens for row in self.kept]),
            "mask": np.concatenate([row.mask for row in self.kept]),
            "offsets": np.cumsum([0, *(len(row.tokens) for row in self.kept)], dtype=np.int64),
            "prompts": np.array([row.prompt for row in self.kept], dtype=np.int64),
            "supervised": np.array([row.mask.sum() for row in self.kept], dtype=np.int64),
            "sources": np.array([index[source] for source, _ in self.ids], dtype=np.int64),
            "rows": np.array([row for _, row in self.ids], dtype=np.int64),
        }
        for name, array in (arrays | self._more()).items():
            np.save(folder / f"{name}.npy", array)
        counts = {"names": names, "counts": self.counts().stored()}
        (folder / "set.json").write_text(json.dumps(counts), encoding="utf-8")
        if self.answers is not None:
            (folder / "answers.jsonl").write_text("".join(f"{line}\n" for line in self.answers), encoding="utf-8")

    def _more(self) -> dict[str, NDArray[Any]]:
        """The arrays that a set of single texts without further columns does not have."""
        more: dict[str, NDArray[Any]] = {}
        if any(row.segments for row in self.kept):
            more["members"] = np.array([len(row.segments) for row in self.kept], dtype=np.int64)
            more["segments"] = np.array([length for row in self.kept for length in row.segments], dtype=np.int64)
        for name in sorted({name for columns in self.columns for name in columns}):
            values = [columns.get(name, DEFAULTS[name]) for columns in self.columns]
            more[f"{COLUMN}{name}"] = np.array(values, dtype=np.float64)
        return more


def runs(mask: NDArray[np.bool_]) -> Sequence[tuple[int, int, bool]]:
    """Stretches (first, last + 1, supervised) of equal mask, in order."""
    borders = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    return [(first, last, bool(mask[first])) for first, last in pairwise(borders)]
