"""data=mixture: several sources, interleaved by weight."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dsft.data.order import permutation
from dsft.data.source import BadRow, Sample, check_shared

if TYPE_CHECKING:
    from dsft.objective import Wants


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """As many rows as the weights allow without repeating one: the scarcest source whole, the others in part."""

    sources: Mapping[str, Any]
    weights: Mapping[str, float]
    seed: int
    eval_fraction: float
    shuffle: bool
    max_eval: int | None
    dedup: bool = True  # may be absent from a YAML that is older than the key

    def __post_init__(self) -> None:
        """Refuse weights without a source, sources without a weight, and keys that only the mixture may set."""
        check_shared(self.eval_fraction, self.max_eval, own=None)
        if self.seed < 0:
            raise ValueError(f"data.seed must be 0 or more, got {self.seed}")
        if not self.sources or set(self.sources) != set(self.weights):
            names = (" ".join(mapping) or "none" for mapping in (self.sources, self.weights))
            raise ValueError("data.weights must name the sources {}, got {}; give each source a weight".format(*names))
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"data.weights.{name} must be above 0, got {weight}; leave the source out instead")
        for name, source in self.sources.items():
            for key, left in (("shuffle", True), ("eval_fraction", 0.0), ("max_eval", None), ("dedup", True)):
                if (got := getattr(source, key)) != left:
                    raise ValueError(
                        f"data.sources.{name}.{key} must be {left}, got {got}; set data.{key} of the mixture"
                    )

        lists = {name: labels for name, source in self.sources.items() if (labels := getattr(source, "labels", None))}
        if lists and (len(lists) < len(self.sources) or len({tuple(labels) for labels in lists.values()}) > 1):
            raise ValueError(
                f"data.sources must all have the same labels, got others in some of {' '.join(self.sources)}: a "
                "label's number is its place in the list; give each source the same list"
            )

    @property
    def labels(self) -> list[str | int] | None:
        """The names of the labels, which are the same in all sources."""
        return next((getattr(source, "labels", None) for source in self.sources.values()), None)

    def check(self, wants: "Wants" = "text") -> None:
        """Raise ValueError for the first source that has something wrong with it."""
        for name, source in self.sources.items():
            with _own_keys(name):
                source.check(wants)

    def identity(self) -> dict[str, Any]:
        """The sources' identities, the weights and the seed."""
        parts = {name: [float(self.weights[name]), source.identity()] for name, source in self.sources.items()}
        return {"source": "mixture", "parts": parts, "order": list(self.sources), "seed": self.seed} | (
            {} if self.dedup else {"dedup": False}
        )

    def rows(self, wants: "Wants" = "text") -> Iterator[Sample | BadRow]:
        """The interleaved samples; ids are name/ and the source's own id. Depends on the seed and the sources alone.

        Bad rows come first, source by source: a bad row takes no other's place.
        """
        names, samples = list(self.sources), list[list[Sample]]()
        for name in names:
            samples.append([])
            first = ""
            for row in _told_apart(name, self.sources[name].rows(wants)):
                if isinstance(row, BadRow):
                    first = first or row.reason
                    yield row
                else:
                    samples[-1].append(row)
            if not samples[-1]:
                raise ValueError(f"data.sources.{name} must give at least one row, got bad ones alone: {first}")
        counts = shares([len(part) for part in samples], [self.weights[name] for name in names])
        chosen = []
        for index, (part, count) in enumerate(zip(samples, counts, strict=True)):
            rows = np.sort(permutation(len(part), self.seed, index)[:count])
            chosen.append(iter([part[row] for row in rows]))
        labels = np.repeat(np.arange(len(names)), counts)
        for label in labels[permutation(len(labels), self.seed, len(names))]:
            yield next(chosen[label])

    def eval_rows(self, wants: "Wants" = "text") -> Iterator[Sample | BadRow] | None:
        """Held-out samples of all sources that bring some, source by source."""
        found = {name: source.eval_rows(wants) for name, source in self.sources.items()}
        parts = {name: part for name, part in found.items() if part is not None}
        if not parts:
            return None
        if self.eval_fraction > 0:
            raise ValueError(
                f"data.eval_fraction must be 0 where sources hold rows out ({' '.join(parts)}), "
                f"got {self.eval_fraction}; give one of the two"
            )
        return (sample for name, part in parts.items() for sample in _told_apart(name, part))

    def skips(self, bad: BadRow) -> bool:
        """The answer of the source that the row is from."""
        name = max((name for name in self.sources if bad.source.startswith(f"{name}/")), key=len)
        return bool(self.sources[name].skips(replace(bad, source=bad.source.removeprefix(f"{name}/"))))

    def score(self, entry: dict[str, Any], reference: str, answer: str) -> float:
        """The verdict of the source that the sample is from."""
        return float(self.sources[entry["source"]].score(entry["entry"], reference, answer))


def shares(lengths: list[int], weights: list[float]) -> list[int]:
    """Rows to take of each source: in the ratio of weights, none above its length, at least one of each."""
    total = min(length / weight for length, weight in zip(lengths, weights, strict=True))
    return [min(length, max(1, round(total * weight))) for length, weight in zip(lengths, weights, strict=True)]


def _told_apart(name: str, rows: Iterator[Sample | BadRow]) -> Iterator[Sample | BadRow]:
    """The rows of one source, with its name before their ids, and its keys in what is wrong with them."""
    with _own_keys(name):
        for row in rows:
            yield _prefixed(name, row)


def _prefixed(name: str, sample: Sample | BadRow) -> Sample | BadRow:
    if isinstance(sample, BadRow):
        return replace(sample, source=f"{name}/{sample.source}", reason=_of_source(name, sample.reason))
    entry = None if sample.entry is None else {"source": name, "entry": sample.entry}
    rejected = None if sample.rejected is None else replace(sample.rejected, source=f"{name}/{sample.source}")
    return replace(sample, source=f"{name}/{sample.source}", entry=entry, rejected=rejected)


@contextmanager
def _own_keys(name: str) -> Iterator[None]:
    """What a source refuses by its keys below data is refused by those that the mixture has for it."""
    try:
        yield
    except ValueError as error:
        raise type(error)(_of_source(name, str(error))) from None


def _of_source(name: str, said: str) -> str:
    """What is said, with the source's own keys; ++, as the mixture's YAML need not have those with a default."""
    typed = re.sub(r"\bdata\.(?!sources\.)(\w+)=", rf"++data.sources.{name}.\1=", said)
    return re.sub(r"\bdata\.(?!sources\.)(\w+)", rf"data.sources.{name}.\1", typed)
