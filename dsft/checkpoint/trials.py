"""Which checkpoint is to blame for crashes: after two from one of them, the older one is tried in its place.

RUN/checkpoints/crashes/
    step-N.attempt-K        an attempt that started from step N crashed before it saved again; in it, at which step
    trial.json              the checkpoint that is set aside meanwhile: its step, where it lies, where it crashed
    trial.attempt-K         an attempt crashed while that checkpoint was set aside
    trial.metrics.jsonl     the run's records as they were before, since a start from an older step drops later lines
    step-N.acquitted        the error was not that checkpoint's doing: no crash counts against it any more

A checkpoint stays set aside only if the run gets past the step at which it crashed without it. If the run crashes at or
before that step all the same, it is put back. Any rank may leave a mark; rank 0 alone moves checkpoints, and each move
is found half done, and finished, by the next start: trial.json is written before the checkpoint is moved and removed
last of all.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dsft_launchers.files import replace_text

from dsft.checkpoint import manifest
from dsft.checkpoint.quarantine import Quarantine

FOLDER = "crashes"
TRIAL = "trial"
RECORDS = ("metrics.jsonl", "samples.jsonl")
"""Files of the run folder with lines for each step (dsft.telemetry.record)."""
PATIENCE = 2
"""Starts that may crash by an exception before the checkpoint they started from is tried."""


@dataclass(frozen=True)
class Trial:
    """A checkpoint that is tried. at: the step by which starts from it crashed; place: its name in the quarantine."""

    step: int
    at: int
    place: str


@dataclass(frozen=True)
class Settled:
    """How a trial ended. event, step and details are what the run's watch is told."""

    event: str
    step: int
    details: dict[str, str]


class Trials:
    """The crashes of one run, and the trial of one of its checkpoints. folder: RUN/checkpoints."""

    def __init__(self, folder: Path, quarantine: Quarantine) -> None:
        self.folder, self.marks, self.quarantine = folder, folder / FOLDER, quarantine

    def mark(self, step: int, attempt: int, at: int) -> None:
        """Note that an attempt crashed at step `at`. step: the checkpoint to blame; 0: none, as it has saved since."""
        trial = self.trial()
        if trial is None and step == 0:
            return
        self.marks.mkdir(exist_ok=True)
        name = TRIAL if trial is not None else manifest.folder_name(step)
        replace_text(self.marks / f"{name}.attempt-{attempt}", json.dumps({"step": step, "at": at}) + "\n")

    def reason(self, checkpoint: Path) -> str | None:
        """Return why a checkpoint should be tried; None if it should not, or another one is being tried."""
        crashes = self.crashes(checkpoint)
        if crashes < PATIENCE or self._acquitted(checkpoint.name).exists() or self.trial() is not None:
            return None
        return f"{crashes} starts from it crashed, the last by step {self._last(checkpoint)}"

    def begin(self, checkpoint: Path, older: Path) -> tuple[Path, str]:
        """Set a checkpoint aside while older is tried; return where it is, and why."""
        place, at = self.quarantine.place_for(checkpoint), self._last(checkpoint)
        reason = f"{self.reason(checkpoint)}; it comes back unless the run gets past that step from {older.name}"
        self._close()
        for name in RECORDS:
            if (self.folder.parent / name).is_file():
                shutil.copyfile(self.folder.parent / name, self.marks / f"{TRIAL}.{name}")
        replace_text(self.marks / f"{TRIAL}.json", json.dumps(asdict(Trial(_step(checkpoint), at, place.name))) + "\n")
        self.quarantine.take(checkpoint, place, reason)
        self._forget(checkpoint.name)
        return place, reason

    def trial(self) -> Trial | None:
        """Return the trial that goes on; None if there is none."""
        try:
            found = Trial(**json.loads((self.marks / f"{TRIAL}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return found if (self.quarantine.folder / found.place).is_dir() else None

    def settle(self, newest: int) -> Settled | None:
        """End the trial if what happened since decides it; return how. newest: step of the newest checkpoint."""
        trial = self.trial()
        if trial is None:
            self._close()  # of one that was killed before the checkpoint was moved, or after it was back
            return None
        name = manifest.folder_name(trial.step)
        crashes = sorted(_read(mark, trial.at)["at"] for mark in self._marks(TRIAL))
        if self._acquitted(name).exists() or (newest < trial.at and crashes and crashes[0] <= trial.at):
            step = f"step {crashes[0]}" if crashes else "as early a step"
            return self.acquit(f"without it the run crashed at {step} as well: the error is not its doing", newest)
        if newest >= trial.at or crashes:
            return self._condemn(trial)
        return None

    def acquit(self, reason: str, newest: int = 0) -> Settled | None:
        """Put the checkpoint that is tried back, and the records if the run goes on from it. None if nothing is tried.

        newest: step of the newest of the others.
        """
        trial = self.trial()
        if trial is None:
            return None
        name, place = manifest.folder_name(trial.step), self.quarantine.folder / trial.place
        self._acquitted(name).touch()
        if os.path.lexists(self.folder / name):
            reason += f"; step {trial.step} was saved again meanwhile, so that this one stays in {place}"
            self.quarantine.explain(place, reason)
        else:
            for record in RECORDS if trial.step > newest else ():
                with contextlib.suppress(FileNotFoundError):  # put back already, by a process that was killed then
                    (self.marks / f"{TRIAL}.{record}").replace(self.folder.parent / record)
            self.quarantine.give_back(place, self.folder / name)
        self._forget(name)
        self._close()
        return Settled("put_back", trial.step, {"checkpoint": name, "reason": reason})

    def forget(self, step: int, *, gone: bool) -> None:
        """Forget the crashes from a checkpoint: a start from it has saved another. gone: its acquittal, too."""
        self._forget(manifest.folder_name(step))
        if gone:
            self._acquitted(manifest.folder_name(step)).unlink(missing_ok=True)

    def crashes(self, checkpoint: Path) -> int:
        """Return how many attempts crashed by an exception after starting from checkpoint."""
        return len(list(self._marks(checkpoint.name)))

    def _condemn(self, trial: Trial) -> Settled:
        name, place = manifest.folder_name(trial.step), self.quarantine.folder / trial.place
        reason = f"the run crashed from it by step {trial.at}, and got past that step without it"
        self.quarantine.explain(place, reason)
        self._forget(name)
        for mark in self._marks(TRIAL):  # crashes of later steps speak against what they started from
            found = _read(mark, 0)
            if found["step"]:
                mark.rename(self.marks / mark.name.replace(TRIAL, manifest.folder_name(found["step"]), 1))
        self._close()
        return Settled("condemned", trial.step, {"checkpoint": name, "reason": reason, "moved_to": str(place)})

    def _close(self) -> None:
        """Remove what is left of a trial; trial.json last, as what comes after a kill goes by it."""
        for left in sorted(self.marks.glob(f"{TRIAL}.*"), key=lambda path: path.name == f"{TRIAL}.json"):
            left.unlink(missing_ok=True)

    def _last(self, checkpoint: Path) -> int:
        """Return the latest step at which a start from checkpoint crashed; an older dsft did not note it."""
        return max(_read(mark, _step(checkpoint) + 1)["at"] for mark in self._marks(checkpoint.name))

    def _acquitted(self, name: str) -> Path:
        return self.marks / f"{name}.acquitted"

    def _marks(self, name: str) -> Iterator[Path]:
        return self.marks.glob(f"{name}.attempt-*")

    def _forget(self, name: str) -> None:
        for mark in self._marks(name):
            mark.unlink(missing_ok=True)


def _read(mark: Path, unknown: int) -> dict[str, int]:
    """Return the step that a mark blames and the step of the crash; unknown for one that says neither."""
    try:
        found = json.loads(mark.read_text())
        return {"step": int(found["step"]), "at": int(found["at"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"step": 0, "at": unknown}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
