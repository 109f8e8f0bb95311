"""skipped_rows.jsonl: the rows that are not learned from, one a line, each with its id, its place and the reason."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
