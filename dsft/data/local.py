"""data=local: rows of a jsonl, json, csv or parquet file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsft.data import formats
from dsft.data.files import check_file, digest_file, read_records
from dsft.data.numbers import names_of
from dsft.data.source import BadRow, OnBadRow, Sample, check_shared, refuse_bad, score_exact

if TYPE_CHECKING:
    from dsft.objective import Wants


@dataclass(frozen=True, kw_only=True)
class Local:
    """Rows of one file, and held-out rows of another or a share of the same."""

    path: str
    eval_path: str | None
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
        check_shared(self.eval_fraction, self.max_eval, own="data.eval_path" if self.eval_path else None)
        if self.eval_path == self.path:
            raise ValueError(
                f"data.eval_path must differ from data.path, got {self.path} twice; use data.eval_fraction"
            )
        self._columns()

    def check(self, wants: "Wants" = "text") -> None:
        """Raise ValueError if a file is missing or empty, or its first row is broken or in no known format."""
        check_file(self.path, key="data.path")
        next(
            refuse_bad(self.rows(wants), self.skips), None
        )  # None: all rows are bad, which open_data says with their number
        if self.eval_path:
            check_file(self.eval_path, key="data.eval_path")
            next(refuse_bad(self._read(self.eval_path, wants), self.skips), None)

    def identity(self) -> dict[str, Any]:
        """Digests of the files and how they are read."""
        paths = [self.path, self.eval_path] if self.eval_path else [self.path]
        return {
            "source": "local",
            "files": [[Path(path).stem, Path(path).suffix.lower(), digest_file(path)] for path in paths],
            "columns": self._columns().identity(),
            **({} if self.dedup else {"dedup": False}),
        }

    def rows(self, wants: "Wants" = "text") -> Iterator[Sample | BadRow]:
        """Samples of path; ids are stem:row."""
        return self._read(self.path, wants)

    def eval_rows(self, wants: "Wants" = "text") -> Iterator[Sample | BadRow] | None:
        """Samples of eval_path, if there is one."""
        return self._read(self.eval_path, wants) if self.eval_path else None

    def skips(self, bad: BadRow) -> bool:
        """True with data.on_bad_row=skip."""
        return self.on_bad_row == "skip"

    def score(self, entry: dict[str, Any], reference: str, answer: str) -> float:
        """1.0 if answer equals the reference, both stripped."""
        return score_exact(reference, answer)

    def _read(self, path: str, wants: "Wants") -> Iterator[Sample | BadRow]:
        others = (
            record for each in (self.path, self.eval_path) if each and each != path for record in read_records(each)
        )
        records, columns = read_records(path), self._columns()
        return columns.samples(records, Path(path).stem, wants=wants, path=path, elsewhere=others)

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
