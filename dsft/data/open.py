"""The door of the data package: a source and a tokenizer in, two audited token sets out."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from dsft_launchers.files import readable_by_all
from numpy.typing import NDArray

from dsft.data.audit import Audit, Counts
from dsft.data.cache import (
    INPUTS,
    cache_root,
    digest_of,
    digests_of_arrays,
    find_or_build,
    token_folder,
    tokenizer_identity,
)
from dsft.data.encoded import Encoded
from dsft.data.encoding import Encoder
from dsft.data.facts import facts
from dsft.data.length import OverLong
from dsft.data.pairs import encode
from dsft.data.skipped import with_way_out, write_skipped
from dsft.data.source import BadRow, Sample, Source, held_out
from dsft.data.store import SetWriter, runs
from dsft.data.tokens import TokenSet
from dsft.data.unwritten import Written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dsft.config import Run
    from dsft.objective import Wants

_CHUNK = 1024
"""Rows that are rendered and tokenised together."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Tokenised data of a run. digest, inputs: SHA-256, hexadecimal, of the tokens and all that goes with them, and of
    everything that decided them. day: the date that the chat template was told (ISO), None if it asks for none.
    top_token: the largest token of all examples.
    """

    source: Source
    train: TokenSet
    eval: TokenSet | None
    audit: Audit
    digest: str
    inputs: str
    day: str | None
    top_token: int

    @property
    def digests(self) -> dict[str, str]:
        """What a run folder keeps of them: data_digest of the inputs, tokens_digest, and the template_date if any."""
        day = {} if self.day is None else {"template_date": self.day}
        return {"data_digest": self.inputs, "tokens_digest": self.digest, **day}

    @property
    def notes(self) -> list[str]:
        """What a person should know beside the audit, a line each."""
        fixed = f"the chat template reads the date; it is fixed to {self.day} for this run"
        return [] if self.day is None else [fixed]

    @cached_property
    def classes(self) -> int:
        """How many labels there are: as many as data.labels lists, else one more than the largest of both sets."""
        if labels := getattr(self.source, "labels", None):
            return len(labels)
        sets = [part for part in (self.train, self.eval) if part is not None]
        return 1 + max(int(part.columns["label"].max()) for part in sets)

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
    source: Source, tokenizer: "PreTrainedTokenizerBase", *, max_length: int, seed: int, wants: "Wants" = "text",
    cache_dir: Path | None = None, day: str | None = None, after: Callable[[], None] | None = None,
) -> Dataset:  # fmt: skip
    """The source's rows, tokenised, told apart and audited; from the token cache if they were before.

    max_length: tokens, longer rows are dropped and counted. seed: of the split that data.eval_fraction asks for. wants:
    the kind of rows that the objective takes.
    cache_dir: instead of $DSFT_CACHE or ~/.cache/dsft. day: the date (ISO) for a chat template that asks for it, as the
    run's first start told it (Dataset.day); None: today. Safe to call in many processes at once. Cached tokens are read
    from end to end and compared with their digests; made anew, and said, if they changed. after: waits until another
    process of this machine has done so, in place of this one. Raises ValueError, one line, for data that cannot be read
    or leaves nothing to learn from.
    """
    source.check(wants)
    encoder = Encoder(tokenizer, date.fromisoformat(day) if day else None, max_length)
    told = encoder.day.isoformat() if encoder.reads_date else None
    inputs = digest_of(
        {
            "version": INPUTS,
            "source": source.identity(),
            "eval": [source.max_eval, source.eval_fraction, seed if source.eval_fraction > 0 else None],
            "tokenizer": tokenizer_identity(tokenizer),
            "max_length": max_length,
            **({} if wants == "text" else {"wants": wants}),
        }
    )
    if after is not None:
        after()
    folder = find_or_build(
        token_folder(cache_dir or cache_root(), inputs, told),
        lambda aside: _build(aside, source, encoder, wants=wants, max_length=max_length, seed=seed),
        compare=after is None,
    )
    train, train_counts = _load(folder / "train")
    held, held_counts = _load(folder / "eval") if (folder / "eval").is_dir() else (None, None)
    extra = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    segments = [extra["example"], *([extra["rejected"]] if "rejected" in extra else [])]
    audit = Audit(
        train=train_counts,
        eval=held_counts,
        overlap=extra["overlap"],
        segments=[[(str(piece), bool(on)) for piece, on in segment] for segment in segments],
        lengths=extra.get("segments", ()),
        facts=extra.get("facts", ()),
        unread=extra["unread"],
    )
    digest = digest_of(digests_of_arrays(folder))
    return Dataset(source, train, held, audit, digest, inputs, told, extra["top_token"])


def open_for(
    run: "Run", tokenizer: "PreTrainedTokenizerBase", *, day: str | None = None, after: Callable[[], None] | None = None
) -> Dataset:
    """The data of a run, by its keys and of the kind that its objective wants; see open_data."""
    return open_data(
        run.data, tokenizer, max_length=run.train.max_length, seed=run.train.seed, wants=run.objective.wants, day=day,
        after=after,
    )  # fmt: skip


def _build(folder: Path, source: Source, encoder: Encoder, *, wants: "Wants", max_length: int, seed: int) -> None:
    shared: dict[str, Any] = {"max_length": max_length, "stop_tokens": encoder.kinds.special, "dedup": source.dedup}
    train = SetWriter(limit=None, answers=False, **shared)
    held = SetWriter(limit=source.max_eval, answers=True, **shared)
    for sample, encoded in _encoded(source.rows(wants), encoder, source):
        apart = source.eval_fraction > 0 and held_out(sample, seed=seed, fraction=source.eval_fraction)
        (held if apart else train).add(sample, encoded)
    own = source.eval_rows(wants)
    if own is not None:
        for sample, encoded in _encoded(own, encoder, source):
            if held.full:
                break
            held.add(sample, encoded)
    train.check("the training data")
    told = facts(wants, train.kept, train.columns, getattr(source, "labels", None))
    train.write(folder / "train")
    if own is not None or source.eval_fraction > 0:
        held.check("the held-out data")
        held.write(folder / "eval")
    first = train.kept[0]
    segments = [_pieces(encoder, tokens, mask) for tokens, mask in first.parts]
    extra = {
        "overlap": len(train.seen & held.seen),
        "example": segments[0],
        **({"rejected": segments[1], "segments": first.segments} if first.segments else {}),
        **({"facts": told} if told else {}),
        "unread": list(train.unread | held.unread),
        "top_token": max(int(row.tokens.max()) for part in (train, held) for row in part.kept),
    }
    (folder / "audit.json").write_text(json.dumps(extra), encoding="utf-8")
    write_skipped([*train.skipped, *held.skipped], folder)
    if not all(map(readable_by_all, _files_of(source))):
        folder.chmod(0o700)


def _pieces(encoder: Encoder, tokens: NDArray[np.int32], mask: NDArray[np.bool_]) -> list[tuple[str, bool]]:
    """A segment as consecutive pieces of text, each with whether it is supervised."""
    return [(str(encoder.tokenizer.decode(tokens[first:end].tolist())), on) for first, end, on in runs(mask)]


def _files_of(source: Any) -> Iterator[Path]:
    """The files and folders of this machine that a source reads, a mixture's sources' too."""
    for path in (getattr(source, name, None) for name in ("path", "eval_path")):
        if path and (file := Path(path).expanduser()).exists():
            yield file
    for part in getattr(source, "sources", {}).values():
        yield from _files_of(part)


def _encoded(
    rows: Iterator[Sample | BadRow], encoder: Encoder, source: Source
) -> Iterator[tuple[Sample | BadRow, Encoded | OverLong | BadRow]]:
    """Each row with its tokens, or with why it has none. Raises ValueError for the first bad row not to be skipped."""
    written = Written(encoder.tokenizer)
    while chunk := list(islice(rows, _CHUNK)):
        encoded = iter(encode(encoder, [row for row in chunk if isinstance(row, Sample)]))
        for row in chunk:
            found: Encoded | OverLong | BadRow
            found = row if isinstance(row, BadRow) else with_way_out(source, next(encoded))
            if isinstance(found, BadRow) and not source.skips(found):
                raise ValueError(found.reason)
            if isinstance(row, Sample) and (names := written.unwritten(row)):
                row = replace(row, unread=(*row.unread, *(f"{name} of turns" for name in names)))
            yield row, found


def _load(folder: Path) -> tuple[TokenSet, Counts]:
    described = json.loads((folder / "set.json").read_text(encoding="utf-8"))
    return TokenSet.load(folder, described["names"]), Counts(**described["counts"])
