"""data=reasoning_gym: procedural tasks with verifiers (https://github.com/open-thought/reasoning-gym)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dsft.data.kinds import other_kind
from dsft.data.source import BadRow, Sample, check_shared

if TYPE_CHECKING:
    from dsft.objective import Wants

_EVAL_SEED = 1_000_000_007
"""Distance between the seeds of rows to learn from and held-out rows: item i of a task is drawn from seed + i."""

_ATTEMPTS = 10
"""Items generated per item wanted, before a task counts as too small to leave any that is not held out."""


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """Generated questions of one task, and held-out ones whose prompts do not occur among them."""

    task: str
    config: Mapping[str, Any] | None
    size: int
    eval_size: int
    seed: int
    system: str | None
    eval_fraction: float
    shuffle: bool
    max_eval: int | None
    dedup: bool = True  # may be absent from a source that an older mixture's YAML spells out

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_shared(self.eval_fraction, self.max_eval, own="data.eval_size" if self.eval_size else None)
        if self.size < 1:
            raise ValueError(f"data.size must be 1 or more, got {self.size}")
        for key in ("eval_size", "seed"):
            if getattr(self, key) < 0:
                raise ValueError(f"data.{key} must be 0 or more, got {getattr(self, key)}")
        for key in ("seed", "size"):
            if key in (self.config or {}):
                raise ValueError(f"data.config must hold options of the task, got {key}; set data.{key}")

    def check(self, wants: "Wants" = "text") -> None:
        """Raise ValueError if other rows are wanted, or the library, the task or one of its options is not there."""
        if wants != "text":
            raise other_kind(wants, "text", "from data=reasoning_gym")
        self._task(1, self.seed)

    def identity(self) -> dict[str, Any]:
        """The task, its options and the library's version."""
        return {
            "source": "reasoning_gym",
            "version": version("reasoning-gym"),
            "task": self.task,
            "config": dict(self.config or {}),
            "sizes": [self.size, self.eval_size],
            "seed": self.seed,
            "system": self.system,
        }

    def rows(self, wants: "Wants" = "text") -> Iterator[Sample]:
        """As many samples as size; ids are task:row, row counting all generated items, held-out ones included."""
        held_out = {item["question"] for item in self._items(self._held_out(), self.eval_size)}
        limit = self.size * _ATTEMPTS if held_out else self.size
        found = 0
        for row, item in enumerate(self._items(self._task(limit, self.seed), limit)):
            if found == self.size:
                return
            if item["question"] not in held_out:
                yield self._sample(self.task, row, item, {"row": row, "limit": limit})
                found += 1
        if found < self.size:
            raise ValueError(
                f"data.size must be a number of items that {self.task} has besides the {self.eval_size} held out, "
                f"got {self.size} with {found} found; lower data.eval_size or data.size, or widen data.config"
            )

    def eval_rows(self, wants: "Wants" = "text") -> Iterator[Sample] | None:
        """As many samples as eval_size, if above 0; ids are task.eval:row."""
        return self._eval_samples() if self.eval_size else None

    def skips(self, bad: BadRow) -> bool:
        """False: rows are made, and a bad one is no slip of the pen."""
        return False

    def score(self, entry: dict[str, Any], reference: str, answer: str) -> float:
        """1.0 if the task's own verifier gives answer full marks."""
        task = self._task(entry["limit"], self.seed) if "limit" in entry else self._held_out()
        return float(task.score_answer(answer=answer.strip(), entry=task[entry["row"]]) >= 1)

    def _eval_samples(self) -> Iterator[Sample]:
        for row, item in enumerate(self._items(self._held_out(), self.eval_size)):
            yield self._sample(f"{self.task}.eval", row, item, {"row": row})

    def _sample(self, source: str, row: int, item: Mapping[str, Any], entry: dict[str, Any]) -> Sample:
        question, answer, place = item["question"], item["answer"], f"{source} row {row}"
        if not isinstance(answer, str):
            raise ValueError(
                f"data.task must have answers to learn from, got {self.task} without one at {place}; name another"
            )
        messages: tuple[dict[str, str], ...]
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        if self.system is not None:
            messages = ({"role": "system", "content": self.system}, *messages)
        plain = (question + "\n", answer) if self.system is None else None
        return Sample(source, row, place, messages, plain, answer, entry)

    def _items(self, task: Any, count: int) -> Iterator[Mapping[str, Any]]:
        return (task[row] for row in range(count))

    def _held_out(self) -> Any:
        return self._task(max(self.eval_size, 1), self.seed + _EVAL_SEED)

    def _task(self, size: int, seed: int) -> Any:
        options = json.dumps(dict(self.config or {}), sort_keys=True)
        return _create(self.task, options, size=size, seed=seed)


@lru_cache(maxsize=4)
def _create(task: str, options: str, *, size: int, seed: int) -> Any:
    """The task, ready to generate; cached because a verdict on each of many answers asks for it again."""
    if find_spec("reasoning_gym") is None:
        raise ValueError("data=reasoning_gym must have the reasoning-gym library, got none; pip install 'dsft[demo]'")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(f"data.task must be a task of reasoning_gym ({' '.join(sorted(DATASETS))}), got {task}")
    try:
        return reasoning_gym.create_dataset(task, **json.loads(options), size=size, seed=seed)
    except (TypeError, ValueError, AssertionError) as error:
        reason = (str(error) or "refused").splitlines()[0]
        raise ValueError(
            f"data.config must hold options of {task}, got {options}; reasoning_gym says: {reason}"
        ) from None
