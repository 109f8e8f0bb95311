"""A set of tokenised examples, memory-mapped: ragged arrays laid end to end."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARRAYS = ("tokens", "mask", "offsets", "prompts", "supervised", "sources", "rows")
"""Files NAME.npy of a set: tokens (T,) int32, mask (T,) bool, offsets (N + 1,) int64, and per example (N,) the prompt's
length, the supervised tokens, the index of its source's name and its row, all int64."""

SEGMENTS = ("members", "segments")
"""Further files of a set whose examples are several segments: segments per example (N,) and tokens per segment (S,),
both int64. Without them each example is one."""

COLUMN = "column-"
"""Begins the name of the file of a further value per example (N,) float64, which some row of the set has."""

SCORES, BESIDE = "scores", "scores-beside"
"""Names of arrays that are no files of a set: float32, one per supervised token of all examples, and of prompts with
answers to others; each has offsets (N + 1,) under its name with OFFSETS behind it."""
OFFSETS = "-offsets"

DEFAULTS = {"label": 0.0, "margin": 0.0, "weight": 1.0}
"""Columns, and what a row says that has none: every row has a label where one has."""


@dataclass(frozen=True, eq=False)
class TokenSet:
    """N examples, T tokens. Reads pages of its files as they are needed; nothing is copied into memory at the start."""

    folder: Path
    names: Sequence[str]
    arrays: dict[str, NDArray[Any]]

    @classmethod
    def load(cls, folder: Path, names: Sequence[str]) -> "TokenSet":
        """Map the files in folder. Raises RuntimeError if they do not belong together."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        count, total = len(arrays["offsets"]) - 1, int(arrays["offsets"][-1])
        whole = {name: total if name in ("tokens", "mask") else count for name in ARRAYS if name != "offsets"}
        for path in [*sorted(folder.glob(f"{COLUMN}*.npy")), *(folder / f"{name}.npy" for name in SEGMENTS)]:
            if path.exists():
                arrays[path.stem], whole[path.stem] = np.load(path, mmap_mode="r"), count
        if "segments" in arrays:
            whole["segments"] = int(arrays["members"].sum())
        if any(len(arrays[name]) != size for name, size in whole.items()):
            raise RuntimeError(f"token cache {folder.parent} is damaged; delete that folder and start again")
        return cls(folder, names, arrays)

    def __len__(self) -> int:
        return len(self.arrays["rows"])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example (N,), of all its segments together."""
        return np.diff(self.arrays["offsets"])

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """Segments per example (N,)."""
        return self.arrays["members"] if "members" in self.arrays else np.ones(len(self), dtype=np.int64)

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return int((self.arrays["segments"] if "segments" in self.arrays else self.lengths).max())

    @cached_property
    def columns(self) -> dict[str, NDArray[np.float64]]:
        """Further values by name, one per example (N,); only those that some row of the set has.

        label: of a rated example 1 is good and 0 is bad, of a labelled one the number of its class. margin: how much
        better the chosen answer of a pair is, 0 where its row does not say. weight: of an example in a mean, above 0, 1
        where its row does not say.
        """
        return {name.removeprefix(COLUMN): each for name, each in self.arrays.items() if name.startswith(COLUMN)}

    @property
    def supervised(self) -> NDArray[np.int64]:
        """Supervised tokens per example (N,): as many as its targets that carry loss."""
        return self.arrays["supervised"]

    def id(self, index: int) -> str:
        """source:row of an example."""
        return f"{self.names[self.arrays['sources'][index]]}:{self.arrays['rows'][index]}"

    def example(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens (L,) and mask (L,) of an example, its segments end to end, read-only."""
        first, last = self.arrays["offsets"][index : index + 2]
        return self.arrays["tokens"][first:last], self.arrays["mask"][first:last]

    def segments(self, index: int) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Tokens and mask of each segment of an example, in order; of a pair the chosen answer, the rejected one."""
        tokens, mask = self.example(index)
        if "segments" not in self.arrays:
            return [(tokens, mask)]
        first = self._starts[index]
        borders = np.cumsum(self.arrays["segments"][first : first + self.members[index] - 1])
        return list(zip(np.split(tokens, borders), np.split(mask, borders), strict=True))

    def mismatch(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens and mask of an example's prompt with the answer of the one before, the first with that of the last.

        Cut to the longest example of the set: a model may take no more.
        """
        (tokens, mask), (others, learned) = self.example(index), self.example((index - 1) % len(self))
        prompt, answer = int(mask.argmax()), int(learned.argmax())
        joined = np.concatenate([tokens[:prompt], others[answer:]])
        marks = np.concatenate([np.zeros(prompt, dtype=np.bool_), learned[answer:]])
        return joined[: self.longest], marks[: self.longest]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The number of each example's first segment (N,)."""
        return np.cumsum(self.members) - self.members

    def scores(self, name: str, index: int) -> NDArray[np.float32]:
        """(P,): what SCORES or BESIDE holds of an example."""
        first, last = self.arrays[f"{name}{OFFSETS}"][index : index + 2]
        return self.arrays[name][first:last]

    def prompt(self, index: int) -> NDArray[np.int32]:
        """What a model is given to write the example's last assistant turn, generation prompt included; empty for text.

        Of a pair: what stands before both answers.

        Held-out examples whose answers can be judged have it as the tokenizer writes it for that, which may be other
        tokens than those before the turn in the example.
        """
        if (self.folder / "answers.jsonl").exists() and (asked := self._answers[index].get("asked")) is not None:
            return np.array(asked, dtype=np.int32)
        return self.example(index)[0][: self.arrays["prompts"][index]]

    def reference(self, index: int) -> str:
        """The right answer as text: the last assistant turn; empty for plain text. Kept for held-out examples only."""
        return str(self._answers[index]["reference"])

    def entry(self, index: int) -> dict[str, Any] | None:
        """What the source's score needs to judge an answer, None if it cannot. Kept for held-out examples only."""
        entry: dict[str, Any] | None = self._answers[index]["entry"]
        return entry

    @cached_property
    def _answers(self) -> list[dict[str, Any]]:
        assert (self.folder / "answers.jsonl").exists(), "references are kept for held-out examples only"
        with (self.folder / "answers.jsonl").open(encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]
