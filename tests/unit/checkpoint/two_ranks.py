"""python -m tests.unit.checkpoint.two_ranks FINISHED PLACE: what resuming and gather do on two ranks.

Each rank writes PLACE/rank-R.json: scene -> what it saw. The last scene is the death of rank 1.
"""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from dsft import folder
from dsft.checkpoint import manifest
from dsft.checkpoint.lease import acquire
from dsft.checkpoint.saver import Retention, Saver
from dsft.checkpoint.store import Store
from dsft.comm.world import World, join, lost_peer
from dsft.compose import load_yaml, read
from dsft.engine.assemble import Session, assemble
from dsft.engine.resume import resume
from tests.unit.checkpoint.earlier import plant
from tests.unit.checkpoint.resuming import Told

FILE, NEWEST = "__1_0.distcp", manifest.folder_name(6)
Outcome = dict[str, Any]


def flip(run_dir: Path, step: int = 6) -> None:
    path = run_dir / "checkpoints" / manifest.folder_name(step) / FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def flip_all(run_dir: Path) -> None:
    for step in (1, 3, 6):
        flip(run_dir, step)


def poison(run_dir: Path) -> None:
    plant(run_dir / "checkpoints" / NEWEST, run_dir / "ran")


def nothing(run_dir: Path) -> None:
    pass


@contextmanager
def fails(method: str, number: int) -> Iterator[None]:
    """In this process alone a method of Path raises for the newest checkpoint's FILE, as on a node in trouble."""
    real = getattr(Path, method)

    def planted(path: Path, *args: Any, **keys: Any) -> Any:
        if path.name == FILE and NEWEST in path.parts:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **keys)

    setattr(Path, method, planted)
    try:
        yield
    finally:
        setattr(Path, method, real)


SCENES: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "a bit flipped": (flip, "", 0),
    "code in the index": (poison, "", 0),
    "a bit flipped in all": (flip_all, "", 0),
    "missing for rank 1": (nothing, "stat", errno.ENOENT),
    "unreadable for rank 1": (nothing, "open", errno.EIO),
}
"""Scene -> what rank 0 does to the run; a method of Path that fails on rank 1, and how."""


def played(session: Session, finished: Path, place: Path, name: str) -> Outcome:
    harm, method, number = SCENES[name]
    world, run_dir, told = session.world, place / name, Told()
    lease = None
    if world.rank == 0:
        shutil.copytree(finished, run_dir)
        harm(run_dir)
        lease, _ = acquire(run_dir / "checkpoints", os.environ)
    world.barrier()
    who = folder.identity(run_dir, load_yaml(run_dir / "config.yaml"))
    outcome: Outcome = {"error": "", "says": ""}
    with fails(method, number) if method and world.rank == 1 else nullcontext():
        try:
            outcome["step"] = resume(session, run_dir, who, lease, 9, told).step  # type: ignore[arg-type]
        except Exception as error:
            outcome = {"error": type(error).__name__, "says": str(error)}
    there = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    events = [(event, step) for event, step, _ in told.events]
    reasons = [str(details["reason"]) for event, _, details in told.events if event == "quarantine"]
    ran = (run_dir / "ran").exists()
    return {**outcome, "events": events, "reasons": reasons, "ran": ran, "there": there}


def refused(world: World) -> Outcome:
    """What is no data is refused where it is sent, before anything is; the group is as good as before."""
    values = [
        ValueError("an error"),
        manifest.DamagedError(manifest.Damage("a", "b")),
        torch.ones(1),
        [{"a": object()}],
    ]
    said = []
    for value in values:
        try:
            world.gather(value)
        except TypeError as error:
            said.append(str(error))
    return {"said": said, "then": [str(found) for found in world.gather(manifest.Damage(f"of {world.rank}", "why"))]}


def settled(world: World, place: Path) -> Outcome:
    """A save that ends the trial of another checkpoint says so on every rank."""
    store = Store(place)
    lease = acquire(store.folder, os.environ)[0] if world.rank == 0 else None
    if lease is not None:
        for step in (3, 6):
            (store.folder / manifest.folder_name(step)).mkdir()
        for attempt in (1, 2):
            store.mark_crash(6, attempt, at=8)
        newest, older = store.newest_first()
        store.trials.begin(newest, older)
    world.barrier()
    saver = Saver(store, lease, manifest.Identity("r", "c", "b", "d"), world, Retention(9, 0))
    saver.start(9, lambda: {"param/a": torch.ones(8)}, {}, background=True)
    outcome = saver.take()
    assert outcome is not None
    assert outcome.settled is not None, outcome
    return {"event": outcome.settled.event, "step": outcome.settled.step}


def left_alone(world: World) -> Outcome:
    """Rank 1 is killed in a collective; what rank 0 then raises."""
    world.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        world.gather("are you there?")
    except Exception as error:
        try:
            raise ValueError("made of it") from error
        except ValueError as other:
            return {"type": type(error).__name__, "says": str(error), "lost": [lost_peer(error), lost_peer(other)]}
    return {}


def main(finished: Path, place: Path) -> None:
    world, run = join(), read(finished)
    session = assemble(run, run.model.resolve(), world, 9)
    seen = {name: played(session, finished, place, name) for name in SCENES}
    seen |= {"refused": refused(world), "settled": settled(world, place / "settled")}
    mine = place / f"rank-{world.rank}.json"
    mine.write_text(json.dumps(seen))
    seen["left alone"] = left_alone(world)
    mine.write_text(json.dumps(seen))
    os._exit(0)  # as dsft.entry does: an interpreter that ends while gloo waits for a peer is aborted


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
