"""The folder RUN/checkpoints: unfinished, committed, set aside, passed over, deleted. Rank 0 alone changes it."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from dsft.checkpoint import manifest
from dsft.checkpoint.lease import Lease
from dsft.checkpoint.manifest import Manifest

CRASHES = "crashes"
PATIENCE = 2
"""Starts that may crash by an exception before the checkpoint they started from is passed over."""


class Store:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "checkpoints"
        self.aside = run_dir / "quarantine"

    def begin(self, step: int) -> Path:
        """A fresh folder to write step into."""
        place = self.folder / f"{manifest.folder_name(step)}.tmp-{uuid.uuid4().hex[:8]}"
        place.mkdir(parents=True)
        return place

    def commit(self, place: Path, content: Manifest, lease: Lease) -> Path:
        """Make what was written into place a checkpoint, on the disk for good. Raises LeaseLostError or OSError."""
        for name, written in content.files.items():
            size = (place / name).stat().st_size
            if size != written.size:
                raise OSError(f"{name} has {size} bytes on the disk, {written.size} were written")
        manifest.write(place, content)
        _sync(place)
        target = self.folder / manifest.folder_name(content.step)
        lease.check(strict=True)
        place.rename(target)  # fails if a newer writer has cleared place, or committed this step itself
        _sync(self.folder)
        return target

    def newest_first(self) -> list[Path]:
        """Folders that bear a checkpoint's name, whatever is in them."""
        named = (path for path in self._named("step-*") if path.name.removeprefix("step-").isdigit())
        return sorted(named, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)

    def clear(self) -> None:
        """Remove what nobody finished: writing or deleting. Only after taking the lease."""
        for unfinished in self._named("step-*.tmp-*"):
            # renamed first: its writer, should it wake up now, finds nothing to commit, not a folder being emptied
            with contextlib.suppress(FileNotFoundError):
                unfinished.rename(unfinished.with_name(f"{unfinished.name}.old-{uuid.uuid4().hex[:8]}"))
        for leftover in self._named("step-*.old-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def quarantine(self, checkpoint: Path, reason: str) -> Path:
        """Set a checkpoint aside, with the reason beside its files."""
        self.aside.mkdir(exist_ok=True)
        target = self.aside / checkpoint.name
        while target.exists():
            target = self.aside / f"{checkpoint.name}-{uuid.uuid4().hex[:4]}"
        checkpoint.rename(target)
        (target / "reason.json").write_text(json.dumps({"reason": reason}) + "\n")
        return target

    def retain(self, keep: int, keep_every: int, newest: int) -> list[int]:
        """Delete all but the newest keep, the multiples of keep_every, and step newest; the steps deleted.

        newest: the step just committed. A folder is renamed first, so that it is never half a checkpoint.
        """
        steps = {int(path.name.removeprefix("step-")): path for path in self.newest_first()}
        kept = {newest, *sorted(steps, reverse=True)[:keep]}
        doomed = [step for step in steps if step not in kept and not (keep_every and step % keep_every == 0)]
        for step in doomed:
            leaving = steps[step].with_name(f"{steps[step].name}.old-{uuid.uuid4().hex[:8]}")
            steps[step].rename(leaving)
            shutil.rmtree(leaving)
        return doomed

    def mark_crash(self, step: int, attempt: int) -> None:
        """Note that an attempt which started from step crashed by an exception before it saved again."""
        marks = self.folder / CRASHES
        marks.mkdir(parents=True, exist_ok=True)
        (marks / f"{manifest.folder_name(step)}.attempt-{attempt}").touch()

    def crashes(self, checkpoint: Path) -> int:
        """Attempts that crashed by an exception after starting from checkpoint."""
        return len(list((self.folder / CRASHES).glob(f"{checkpoint.name}.attempt-*")))

    def forget_crashes(self, step: int) -> None:
        """The checkpoint is gone, or a start from it has saved another."""
        for mark in (self.folder / CRASHES).glob(f"{manifest.folder_name(step)}.attempt-*"):
            mark.unlink()

    def _named(self, pattern: str) -> Iterator[Path]:
        return (path for path in self.folder.glob(pattern) if path.is_dir())


def _sync(folder: Path) -> None:
    """See a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
