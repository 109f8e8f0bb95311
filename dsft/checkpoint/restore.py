"""Resuming: the newest checkpoint that every rank verifies is loaded; what does not verify is set aside and named."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from dsft.checkpoint import files, manifest
from dsft.checkpoint.lease import Lease
from dsft.checkpoint.manifest import DamagedError, Identity, Manifest
from dsft.checkpoint.store import PATIENCE, Store
from dsft.comm.world import World
from dsft.course import KEPT
from dsft.strategy import Strategy

OURS = ("param/", KEPT)
"""Beginnings of the names of what is not the optimizer's."""

Tell = Callable[[str, int, dict[str, object]], None]
"""(event, step, details), called on every rank."""


@dataclass(frozen=True)
class Search:
    """Where to look and what may be taken. lease: rank 0's, checked before anything is moved.

    optimizer: its name; another one's state is left where it is, and only what learns is taken.
    """

    store: Store
    lease: Lease | None
    identity: Identity
    optimizer: str
    world: World
    tell: Tell


def restore(strategy: Strategy, search: Search) -> Manifest | None:
    """Load the newest checkpoint that all ranks verify into strategy; None if there is none. Collective.

    Nothing of the run changes before every rank has verified every byte that it is about to read.
    """
    store, world = search.store, search.world
    for folder in world.gather(store.newest_first())[0]:
        if reason := world.gather(_worn_out(store, folder))[0]:
            _set_aside(search, folder, reason, "")
            continue
        content, state, damage = _verified(strategy, folder, search)
        if damage is not None:
            _set_aside(search, folder, str(damage), damage.file)
            continue
        files.read(state, folder, _group(world))
        strategy.import_state(state)
        return content
    return None


def _worn_out(store: Store, folder: Path) -> str | None:
    crashes = store.crashes(folder)
    return f"{crashes} starts from it crashed" if crashes >= PATIENCE else None


def _verified(
    strategy: Strategy, folder: Path, search: Search
) -> tuple[Manifest | None, dict[str, Tensor], DamagedError | None]:
    """The manifest, a template to fill, and the first damage that any rank found.

    Each rank verifies what it is about to load, rank 0 also what nobody is about to load.
    """
    content, state, reads, damage = None, dict[str, Tensor](), set[str](), None
    try:
        content = manifest.read(folder)
        if content.identity.run != search.identity.run:
            raise DamagedError(manifest.FILE, f"belongs to another run, {content.identity.run}")
        manifest.verify(folder, content, [files.INDEX])
        index = files.index(folder)
        whole = content.progress.get("optimizer") == search.optimizer
        held = {name: shape for name, shape in files.shapes(index).items() if whole or name.startswith(OURS)}
        state = strategy.state_template(held)
        reads = files.needed(state, index)
        manifest.verify(folder, content, reads)
    except DamagedError as error:
        damage = error.with_traceback(None)  # whose frames would keep the template alive
    world = search.world
    everyone = world.gather((reads, damage))
    first = next((found for _, found in everyone if found is not None), None)
    if first is None and world.rank == 0 and content is not None:
        try:
            manifest.verify(folder, content, set(content.files).difference(*(part for part, _ in everyone)))
        except DamagedError as error:
            first = error.with_traceback(None)
    return content, state, world.gather(first)[0]


def _set_aside(search: Search, folder: Path, reason: str, file: str) -> None:
    store, world, tell = search.store, search.world, search.tell
    step = int(folder.name.removeprefix("step-"))
    moved, failure = None, None
    if search.lease is not None:
        search.lease.check(strict=True)
        try:
            moved = store.quarantine(folder, reason)
            store.forget_crashes(step)
        except OSError:
            failure = traceback.format_exc(limit=1)
    if failure := world.gather(failure)[0]:
        raise RuntimeError(f"{folder.name} ({reason}) could not be moved to {store.aside}: {failure}")
    tell("quarantine", step, {"checkpoint": folder.name, "file": file, "reason": reason, "moved_to": str(moved)})


def _group(world: World) -> dist.ProcessGroup | None:
    return dist.group.WORLD if world.size > 1 else None
