"""The folder RUN/quarantine: checkpoints that were set aside, each with the reason. Nothing in it is ever deleted."""

import contextlib
import json
import os
import uuid
from pathlib import Path

REASON = "reason.json"


class Quarantine:
    """The quarantine of one run. Rank 0 alone changes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place_for(self, checkpoint: Path) -> Path:
        """Return a path in the quarantine, made if it is not there, at which nothing is yet."""
        self.folder.mkdir(exist_ok=True)
        place = self.folder / checkpoint.name
        while os.path.lexists(place):
            place = self.folder / f"{checkpoint.name}-{uuid.uuid4().hex[:4]}"
        return place

    def take(self, checkpoint: Path, place: Path, reason: str) -> None:
        """Move a checkpoint to place, and leave the reason beside its files."""
        checkpoint.rename(place)
        self.explain(place, reason)

    def explain(self, place: Path, reason: str) -> None:
        """Write why the checkpoint at place was set aside; a disk that does not take the line leaves it unsaid."""
        with contextlib.suppress(OSError):
            _reason_of(place).write_text(json.dumps({"reason": reason}) + "\n")

    def give_back(self, place: Path, checkpoint: Path) -> None:
        """Move what lies at place back to where it was. Raises OSError if something else is there by now."""
        with contextlib.suppress(OSError):
            _reason_of(place).unlink()
        place.rename(checkpoint)


def _reason_of(place: Path) -> Path:
    """Return the path of the reason: in the checkpoint's own folder, else (a link, a file in its place) beside it."""
    if place.is_dir() and not place.is_symlink():
        return place / REASON
    return place.with_name(f"{place.name}.{REASON}")
