"""Points of a sweep as SLURM job arrays: an array is held until all its points are on record.

So a submission that is killed starts nothing: `tidy` lets those tasks go that are on record, and cancels the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsft_launchers import cluster, submit
from dsft_launchers.shown import shown

from dsft import snapshot
from dsft.compose import Composed
from dsft.config import Slurm
from dsft.dispatch import batch_step, job_of, queued, request
from dsft.preflight import create
from dsft.snapshot import Snapshot

DRY_SIZE = 1001
"""SLURM's own MaxArraySize, where it cannot be asked."""


@dataclass(frozen=True)
class Ready:
    """A point that can start. prepared: plan and digests, as preflight found them."""

    composed: Composed
    prepared: Mapping[str, Any]


@dataclass(frozen=True)
class Array:
    """Points that ask SLURM for the same. first: the point that task 0 is."""

    asked: submit.Request
    command: list[str]
    first: int
    points: list[int]


def slurm(composed: Composed) -> Slurm:
    """The launcher of a point that is a SLURM job."""
    launcher = composed.run.launcher
    assert isinstance(launcher, Slurm), launcher
    return launcher


def arrays(sweep: Path, points: Mapping[int, Ready], code: Snapshot | None, size: int) -> list[Array]:
    """The points by what they ask for, in arrays whose tasks' numbers are below size."""
    groups: dict[str, Array] = {}
    for index, ready in sorted(points.items()):
        first = index // size * size
        asked, command = request(ready.composed, code, sweep), batch_step(ready.composed, f"{sweep}:{first}")
        group = groups.setdefault(repr((asked, command)), Array(asked, command, first, []))
        group.points.append(index)
    at_once = {slurm(ready.composed).max_parallel for ready in points.values()}.pop() if points else None
    throttle = "" if at_once is None else f"%{at_once}"
    return [
        replace(each, asked=replace(each.asked, array=cluster.spell([p - each.first for p in each.points]) + throttle))
        for each in groups.values()
    ]


def show(sweep: Path, points: Mapping[int, Ready]) -> None:
    """Print the batch scripts and submit nothing."""
    for each in arrays(sweep, points, snapshot.of(sweep), DRY_SIZE):
        print(shown(submit.script(each.asked, each.command, sweep / "slurm")))


def submit_points(sweep: Path, points: Mapping[int, Ready], alive: Sequence[str]) -> Iterator[tuple[int, str | None]]:
    """Submit; gives each point with None, or with SLURM's refusal. alive: tasks of this sweep that are not over.

    Where launcher.max_parallel is set, an array waits for those before it: the limit is the sweep's.
    """
    code = snapshot.of(sweep)
    before = sorted({job.partition("_")[0] for job in alive}, key=int)
    for each in arrays(sweep, points, code, cluster.max_array_size()):
        limited = slurm(points[each.points[0]].composed).max_parallel is not None
        asked = replace(each.asked, after=tuple(before) if limited else ())
        try:
            array = submit.submit(asked, each.command, sweep / "slurm")
        except ValueError as error:
            yield from ((index, str(error)) for index in each.points)
            continue
        before.append(array)
        _record(sweep, points, each, array, code)
        print(f"submitted    {len(each.points)} points as job array {array}", flush=True)
        yield from ((index, None) for index in each.points)


def _record(sweep: Path, points: Mapping[int, Ready], each: Array, array: str, code: Snapshot | None) -> None:
    """Make the run folders of an array that is held, each with its task, and let it go."""
    try:
        snapshot.copy(code)
        for index in each.points:
            run_dir, ready = sweep / str(index), points[index]
            create(run_dir, ready.composed, ready.prepared)
            queued(run_dir, f"{array}_{index - each.first}", code)
        cluster.ask("scontrol", "release", array)
    except cluster.ClusterError as error:
        way = f"python -m dsft.sweep resume {sweep} does it"
        raise ValueError(f"array {array} is held and could not be released: {error}; {way}") from error
    except BaseException:
        cluster.ask("scancel", array)
        raise


def tidy(sweep: Path, points: int) -> None:
    """Bring to an end what a submission that was killed has left. Raises ClusterError."""
    recorded = {job_of(sweep / str(index)) for index in range(points)}
    held = cluster.held(sweep / "slurm")
    if known := [job for job in held if job in recorded]:
        cluster.ask("scontrol", "release", ",".join(known))
    if orphans := [job for job in held if job not in recorded]:
        cluster.ask("scancel", *orphans)
