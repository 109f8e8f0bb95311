"""data=hf: rows of a dataset that the datasets library loads, from the hub or from a local folder."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsft.data import disk, formats
from dsft.data.numbers import names_of
from dsft.data.records import Record, table_values
from dsft.data.source import BadRow, OnBadRow, Sample, check_shared, score_exact
from dsft.offline import STAGE, AbsentError, unplugged

if TYPE_CHECKING:
    from dsft.objective import Wants


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """Rows of one split, and held-out rows of another or a share of the same."""

    path: str
    name: str | None
    split: str
    eval_split: str | None
    format: formats.Name
    fields: Mapping[str, str | None]
    system: str | None
    verify: Literal["none", "exact"]
    eval_fraction: float
    shuffle: bool
    max_eval: int | None
    train_on: formats.TrainOn = (
        "all"  # these and what follows may be absent from a source that a mixture's YAML spells out
    )
    on_bad_row: OnBadRow = "stop"
    dedup: bool = True
    ignore: list[str] = field(default_factory=list)
    labels: list[str | bool | int] | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range; labels that are numbers or truths are words from here on."""
        object.__setattr__(self, "labels", names_of(self.labels))
        check_shared(self.eval_fraction, self.max_eval, own="data.eval_split" if self.eval_split else None)
        if self.eval_split == self.split:
            raise ValueError(
                f"data.eval_split must differ from data.split, got {self.split} twice; use data.eval_fraction"
            )
        self._columns()

    def check(self, wants: "Wants" = "text") -> None:
        """Raise ValueError if the datasets library is not installed or path names a folder that is not there."""
        if find_spec("datasets") is None:
            raise ValueError("data=hf must have the datasets library, got none; pip install 'dsft[hf]'")
        if self.path.startswith(("/", "./", "../", "~")) and not self._folder().is_dir():
            raise AbsentError(
                f"data.path must be a dataset id or a folder that exists, got {self.path}; correct the path"
            )

    def identity(self) -> dict[str, Any]:
        """Digests of the splits' content and how it is read."""
        splits = [self.split, self.eval_split] if self.eval_split else [self.split]
        return {
            "source": "hf",
            "splits": [[self._source(split), digest_table(self._load(split))] for split in splits],
            "columns": self._columns().identity(),
            **({} if self.dedup else {"dedup": False}),
        }

    def rows(self, wants: "Wants" = "text") -> Iterator[Sample | BadRow]:
        """Samples of split; ids are id:row."""
        return self._read(self.split, wants)

    def eval_rows(self, wants: "Wants" = "text") -> Iterator[Sample | BadRow] | None:
        """Samples of eval_split, if there is one; ids are id.split:row."""
        return self._read(self.eval_split, wants) if self.eval_split else None

    def skips(self, bad: BadRow) -> bool:
        """True with data.on_bad_row=skip."""
        return self.on_bad_row == "skip"

    def score(self, entry: dict[str, Any], reference: str, answer: str) -> float:
        """1.0 if answer equals the reference, both stripped."""
        return score_exact(reference, answer)

    def _folder(self) -> Path:
        return Path(self.path).expanduser()

    def _source(self, split: str) -> str:
        name = self._folder().resolve().name if self._folder().is_dir() else self.path
        return name if split == self.split else f"{name}.{split}"

    def _load(self, split: str) -> Any:
        self.check()
        import datasets
        import huggingface_hub

        datasets.disable_progress_bars()  # standard error is for the user's one line
        datasets.logging.set_verbosity_error()
        huggingface_hub.logging.set_verbosity_error()
        path = str(self._folder()) if self._folder().is_dir() else self.path
        if disk.is_saved(self._folder()):
            return disk.load(self._folder(), split, name=self.name)
        try:
            return datasets.load_dataset(path, name=self.name, split=split)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            wanted = f"{self.path}, name {self.name}, split {split}"
            absent = unplugged() and not self._folder().is_dir()
            kind, way_out = (AbsentError, f"; {STAGE}") if absent else (ValueError, "")
            raise kind(f"data.path must be a dataset that loads, got {wanted}; {reason}{way_out}") from None

    def _read(self, split: str, wants: "Wants") -> Iterator[Sample | BadRow]:
        splits = [each for each in (self.split, self.eval_split) if each and each != split]
        others = (record for each in splits for record in self._records(each))
        columns, path = self._columns(), f"{self.path}, split {split}"
        records, source = self._records(split), self._source(split)
        return columns.samples(records, source, wants=wants, path=path, elsewhere=others)

    def _records(self, split: str) -> Iterator[Record]:
        source = self._source(split)
        for row, values in enumerate(disk.undecoded(self._load(split))):
            yield Record(row, f"{source} row {row}", table_values(values))

    def _columns(self) -> formats.Columns:
        return formats.Columns(
            format=self.format,
            fields=self.fields,
            system=self.system,
            verify=self.verify,
            train_on=self.train_on,
            ignore=tuple(self.ignore),
            on_bad_row=self.on_bad_row,
            labels=None if self.labels is None else tuple(map(str, self.labels)),
        )


def digest_table(dataset: Any) -> str:
    """SHA-256 of a datasets.Dataset's rows as Arrow bytes, hexadecimal; no path, no date."""
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for batch in table.replace_schema_metadata(None).combine_chunks().to_batches():
            digest.update(batch.schema.serialize())
            digest.update(batch.serialize())
    return digest.hexdigest()
