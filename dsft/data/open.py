"""The door of the data package: a source and a tokenizer in, two audited token sets out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from dsft.data.audit import Audit, Counts
from dsft.data.cache import VERSION, cache_root, digest_of, find_or_build, tokenizer_identity
from dsft.data.encoding import Encoded, Encoder
from dsft.data.source import BadRow, Sample, Source, held_out
from dsft.data.store import SetWriter, runs
from dsft.data.tokens import TokenSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024
"""Rows that are rendered and tokenised together."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Tokenised data of a run. digest: SHA-256 of everything that decided it, hexadecimal."""

    source: Source
    train: TokenSet
    eval: TokenSet | None
    audit: Audit
    digest: str

    @cached_property
    def verifiable(self) -> tuple[int, ...]:
        """Indices of the held-out examples for which a generated answer can be judged."""
        held = self.eval
        return tuple(index for index in range(len(held)) if held.entry(index) is not None) if held is not None else ()

    def verify(self, eval_index: int, answer: str) -> float:
        """1.0 if answer is right for a held-out example, else 0.0; eval_index is one of verifiable."""
        assert self.eval is not None
        entry = self.eval.entry(eval_index)
        assert entry is not None
        return self.source.score(entry, self.eval.reference(eval_index), answer)


def open_data(
    source: Source, tokenizer: "PreTrainedTokenizerBase", *, max_length: int, seed: int, cache_dir: Path | None = None
) -> Dataset:
    """The source's rows, tokenised, told apart and audited; from the token cache if they were before.

    max_length: tokens, longer rows are dropped and counted. seed: of the split that data.eval_fraction asks for.
    cache_dir: instead of $DSFT_CACHE or ~/.cache/dsft. Safe to call in many processes at once. Raises ValueError, one
    line, for data that cannot be read or leaves nothing to learn from.
    """
    source.check()
    encoder = Encoder(tokenizer)
    digest = digest_of(
        {
            "version": VERSION,
            "source": source.identity(),
            "eval": [source.max_eval, source.eval_fraction, seed if source.eval_fraction > 0 else None],
            "tokenizer": tokenizer_identity(tokenizer),
            "max_length": max_length,
        }
    )
    folder = find_or_build(
        cache_dir or cache_root(),
        digest,
        lambda aside: _build(aside, source, encoder, max_length=max_length, seed=seed),
    )
    train, train_counts = _load(folder / "train")
    held, held_counts = _load(folder / "eval") if (folder / "eval").is_dir() else (None, None)
    extra = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    example = [(str(piece), bool(supervised)) for piece, supervised in extra["example"]]
    audit = Audit(train=train_counts, eval=held_counts, overlap=extra["overlap"], example=example)
    return Dataset(source, train, held, audit, digest)


def _build(folder: Path, source: Source, encoder: Encoder, *, max_length: int, seed: int) -> None:
    train = SetWriter(max_length=max_length, limit=None, stop_tokens=encoder.special, answers=False)
    held = SetWriter(max_length=max_length, limit=source.max_eval, stop_tokens=encoder.special, answers=True)
    for sample, encoded in _encoded(source.rows(), encoder):
        apart = source.eval_fraction > 0 and held_out(sample, seed=seed, fraction=source.eval_fraction)
        (held if apart else train).add(sample, encoded)
    own = source.eval_rows()
    if own is not None:
        for sample, encoded in _encoded(own, encoder):
            if held.full:
                break
            held.add(sample, encoded)
    train.counts().check("the training data", max_length)
    train.write(folder / "train")
    if own is not None or source.eval_fraction > 0:
        held.counts().check("the held-out data", max_length)
        held.write(folder / "eval")
    first = train.kept[0]
    pieces = [
        (encoder.tokenizer.decode(first.tokens[start:end].tolist()), supervised)
        for start, end, supervised in runs(first.mask)
    ]
    extra = {"overlap": len(train.seen & held.seen), "example": pieces}
    (folder / "audit.json").write_text(json.dumps(extra), encoding="utf-8")


def _encoded(samples: Iterator[Sample], encoder: Encoder) -> Iterator[tuple[Sample, Encoded]]:
    while chunk := list(islice(samples, _CHUNK)):
        for sample, encoded in zip(chunk, encoder.encode(chunk), strict=True):
            if isinstance(encoded, BadRow):
                raise ValueError(encoded.reason)
            yield sample, encoded


def _load(folder: Path) -> tuple[TokenSet, Counts]:
    described = json.loads((folder / "set.json").read_text(encoding="utf-8"))
    return TokenSet.load(folder, described["names"]), Counts(**described["counts"])
