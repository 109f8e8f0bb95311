"""The folder RUN/checkpoints: unfinished, committed, set aside, passed over, deleted. Rank 0 alone changes it."""

import contextlib
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from dsft_launchers.files import sync

from dsft.checkpoint import manifest
from dsft.checkpoint.lease import Lease
from dsft.checkpoint.manifest import Manifest
from dsft.checkpoint.quarantine import Quarantine
from dsft.checkpoint.trials import Settled, Trials


class Store:
    """The checkpoints of one run."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "checkpoints"
        self.quarantine = Quarantine(run_dir / "quarantine")
        self.trials = Trials(self.folder, self.quarantine)

    def begin(self, step: int) -> Path:
        """Make a fresh folder to write step into. Raises OSError if the run's own folder is gone."""
        place = self.folder / f"{manifest.folder_name(step)}.tmp-{uuid.uuid4().hex[:8]}"
        place.mkdir()
        return place

    def commit(self, place: Path, content: Manifest, lease: Lease) -> Path:
        """Make what was written into place a checkpoint, on the disk for good. Raises LeaseLostError or OSError."""
        for name, written in content.files.items():
            size = (place / name).stat().st_size
            if size != written.size:
                raise OSError(f"{name} has {size} bytes on the disk, {written.size} were written")
        manifest.write(place, content)
        sync(place)
        target = self.folder / manifest.folder_name(content.step)
        lease.check(strict=True)
        place.rename(target)  # fails if a newer writer has cleared place, or committed this step itself
        sync(self.folder)
        return target

    def newest_first(self) -> list[Path]:
        """Return whatever bears a checkpoint's name: folders, and what else may be in their place."""
        named = (path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
        return sorted(named, key=_step, reverse=True)

    def clear(self) -> None:
        """Remove what nobody finished: writing or deleting. Only after taking the lease."""
        for unfinished in self._named("step-*.tmp-*"):
            # renamed first: its writer, should it wake up now, finds nothing to commit, not a folder being emptied
            with contextlib.suppress(FileNotFoundError):
                unfinished.rename(unfinished.with_name(f"{unfinished.name}.old-{uuid.uuid4().hex[:8]}"))
        for leftover in self._named("step-*.old-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def set_aside(self, checkpoint: Path, reason: str) -> Path:
        """Move a checkpoint that is damaged into the quarantine; return where it is now."""
        place = self.quarantine.place_for(checkpoint)
        self.quarantine.take(checkpoint, place, reason)
        self.trials.forget(_step(checkpoint), gone=True)
        return place

    def retain(self, keep: int, keep_every: int, exempt: Collection[int]) -> list[int]:
        """Delete all but the newest keep, the milestones of keep_every, and the exempt steps; the steps deleted.

        A milestone is the first checkpoint of each keep_every steps from the first multiple on, so that one that was
        saved late stays all the same. exempt: the step just committed, and others. A folder is renamed first, so that
        it is never half a checkpoint.
        """
        steps = {_step(path): path for path in self.newest_first() if path.is_dir()}
        kept = {*exempt, *sorted(steps, reverse=True)[:keep], *_milestones(steps, keep_every)}
        doomed = [step for step in steps if step not in kept]
        for step in doomed:
            leaving = steps[step].with_name(f"{steps[step].name}.old-{uuid.uuid4().hex[:8]}")
            steps[step].rename(leaving)
            self.trials.forget(step, gone=True)
            shutil.rmtree(leaving)
        return doomed

    def mark_crash(self, step: int, attempt: int, at: int) -> None:
        """Note that an attempt crashed at step `at` by an error that may be its checkpoint's doing. Any rank may.

        step: the checkpoint that it started from; 0 if it has saved another since, or there was none.
        """
        self.trials.mark(step, attempt, at)

    def settle_trial(self) -> Settled | None:
        """End the trial of a checkpoint if what happened since decides it: after each save, and after a crash.

        Rank 0 calls it, under the lease. None if nothing is tried, or the trial goes on.
        """
        return self.trials.settle(newest=max(map(_step, self.newest_first()), default=0))

    def forget_crashes(self, step: int) -> None:
        """Forget the crashes from a checkpoint, as a start from it has saved another."""
        self.trials.forget(step, gone=False)

    def _named(self, pattern: str) -> Iterator[Path]:
        return (path for path in self.folder.glob(pattern) if path.is_dir())


def _milestones(steps: Iterable[int], keep_every: int) -> set[int]:
    """Return the first step of each window of keep_every steps, but for the window before the first multiple."""
    first: dict[int, int] = {}
    for step in sorted(steps) if keep_every else []:
        first.setdefault(step // keep_every, step)
    return {step for window, step in first.items() if window > 0}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
