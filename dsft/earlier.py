"""RUN/before-N: what an earlier run of a folder has left, moved there when the folder begins anew.

The files are moved one by one into a folder `before-N.anew` (or `before-N.records`), which is called `before-N` once
all are there. A move that was killed is known by that name and finished by the next start. Nothing is deleted.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

ANEW, RECORDS = "anew", "records"
"""Ends of the names of folders into which files are being moved: a whole run's, or its records alone."""

LEFT = ("status.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "quarantine", "adapter*", "checkpoints/*")
"""Names in a run folder that a run which begins anew must not find. Leases stay, so that tokens go on rising."""

DESCRIPTION = ("overrides.yaml", "plan.json", "provenance.json", "skipped_rows.jsonl")
"""Names that are moved too, and made again by the start that begins anew."""

STEPWISE = ("metrics.jsonl", "samples.jsonl")
"""Records with one line per step."""

CONFIG = "config.yaml"


def begin_anew(run_dir: Path) -> Path | None:
    """Move the run in run_dir to RUN/before-N, which is returned; None if it has left nothing.

    config.yaml is copied and stays, since it makes the folder a run's.
    """
    if not movable(run_dir) and not unfinished(run_dir):
        return None
    place = _place(run_dir, ANEW)
    if (run_dir / CONFIG).is_file():
        shutil.copyfile(run_dir / CONFIG, place / CONFIG)
    return _move(run_dir, [*movable(run_dir), *(name for name in DESCRIPTION if (run_dir / name).is_file())], place)


def set_records_aside(run_dir: Path) -> Path | None:
    """Move metrics.jsonl and samples.jsonl to RUN/before-N, which is returned; None if they hold nothing.

    For a run that never saved a checkpoint and begins at step 1 again.
    """
    filled = [name for name in STEPWISE if (run_dir / name).is_file() and (run_dir / name).stat().st_size]
    if not filled and not list(run_dir.glob(f"before-*.{RECORDS}")):
        return None
    return _move(run_dir, filled, _place(run_dir, RECORDS))


def unfinished(run_dir: Path) -> bool:
    """Return True if a start that began anew was killed while it moved the earlier run."""
    return any(run_dir.glob(f"before-*.{ANEW}"))


def movable(run_dir: Path) -> list[str]:
    """Return the names in run_dir of what its run has left."""
    found = [path.relative_to(run_dir).as_posix() for pattern in LEFT for path in sorted(run_dir.glob(pattern))]
    return [name for name in found if not name.startswith(("checkpoints/lease-", "checkpoints/."))]


def target(run_dir: Path) -> Path:
    """Return the folder before-N to which begin_anew moves an earlier run."""
    begun = next(run_dir.glob(f"before-*.{ANEW}"), None)
    return _next(run_dir) if begun is None else begun.with_suffix("")


def _next(run_dir: Path) -> Path:
    numbers = [path.stem.removeprefix("before-") for path in run_dir.glob("before-*")]
    return run_dir / f"before-{1 + max((int(number) for number in numbers if number.isdigit()), default=0)}"


def _place(run_dir: Path, mark: str) -> Path:
    """Return the folder to move into: that of a move which was killed, or a new one."""
    begun = next(run_dir.glob(f"before-*.{mark}"), None)
    place = _next(run_dir).with_suffix(f".{mark}") if begun is None else begun
    place.mkdir(exist_ok=True)
    return place


def _move(run_dir: Path, names: Sequence[str], place: Path) -> Path:
    for name in names:
        goal = place / name
        goal.parent.mkdir(exist_ok=True)
        while os.path.lexists(goal):
            goal = goal.with_name(f"{goal.name}-{uuid.uuid4().hex[:4]}")
        with contextlib.suppress(FileNotFoundError):
            (run_dir / name).rename(goal)
    return place.rename(place.with_suffix(""))
