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
        if any(len(arrays[name]) != size for name, size in whole.items()):
            raise RuntimeError(f"token cache {folder.parent} is damaged; delete that folder and start again")
        return cls(folder, names, arrays)

    def __len__(self) -> int:
        return len(self.arrays["rows"])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example (N,)."""
        return np.diff(self.arrays["offsets"])

    @cached_property
    def members(self) -> NDArray[np.int64]:
        """Segments per example (N,)."""
        return np.ones(len(self), dtype=np.int64)

    @property
    def supervised(self) -> NDArray[np.int64]:
        """Supervised tokens per example (N,): as many as its targets that carry loss."""
        return self.arrays["supervised"]

    def id(self, index: int) -> str:
        """source:row of an example."""
        return f"{self.names[self.arrays['sources'][index]]}:{self.arrays['rows'][index]}"

    def example(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens (L,) and mask (L,) of an example, read-only."""
        first, last = self.arrays["offsets"][index : index + 2]
        return self.arrays["tokens"][first:last], self.arrays["mask"][first:last]

    def prompt(self, index: int) -> NDArray[np.int32]:
        """What a model is given to write the example's last assistant turn, generation prompt included; empty for text.

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
