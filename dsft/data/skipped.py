"""skipped_rows.jsonl: the rows that are not learned from, one a line, each with its id, its place and the reason."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from dsft.data.source import BadRow, Source

T = TypeVar("T")

NAME = "skipped_rows.jsonl"


class Skipped(NamedTuple):
    """id: source:row. place: where the row was when its tokens were made, file:line."""

    id: str
    place: str
    reason: str


def write_skipped(rows: Sequence[Skipped], folder: Path) -> None:
    """Write the list into the folder of a token cache, an empty one too."""
    (folder / NAME).write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), encoding="utf-8")


def copy_skipped(folder: Path, run_dir: Path) -> None:
    """Copy the list from the folder of a token cache into the run folder, which has none if no row was skipped."""
    found = folder / NAME
    if found.is_file() and found.stat().st_size:
        shutil.copyfile(found, run_dir / NAME)
    else:
        (run_dir / NAME).unlink(missing_ok=True)


def with_way_out(source: Source, found: T | BadRow) -> T | BadRow:
    """found; if a model cannot take the row, with the key that leaves such rows out, where the row's source has it."""
    if not isinstance(found, BadRow):
        return found
    key, of_row = "data", source
    for name, part in getattr(source, "sources", {}).items():
        if found.source.startswith(f"{name}/"):
            key, of_row = f"++data.sources.{name}", part
    if getattr(of_row, "on_bad_row", None) != "stop":
        return found
    return replace(found, reason=f"{found.reason}, or leave such rows out with {key}.on_bad_row=skip")
