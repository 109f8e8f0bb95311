"""Resuming: the newest checkpoint that every rank verifies is loaded; what does not verify is set aside and named."""

import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from dsft.checkpoint import files, manifest
from dsft.checkpoint.manifest import DamagedError, Identity, Manifest
from dsft.checkpoint.store import PATIENCE, Store
from dsft.comm.world import World
from dsft.protocols import Shape, Strategy

Tell = Callable[[str, int, dict[str, object]], None]
"""(event, step, details), called on every rank."""


def restore(strategy: Strategy, store: Store, identity: Identity, world: World, tell: Tell) -> Manifest | None:
    """Load the newest checkpoint that all ranks verify into strategy; None if there is none. Collective.

    Nothing of the run changes before every rank has verified every byte that it is about to read.
    """
    for folder in world.gather(store.newest_first())[0]:
        if reason := world.gather(_worn_out(store, folder))[0]:
            _set_aside(store, folder, world, tell, reason, "")
            continue
        content, damage = _verified(strategy, folder, identity, world)
        if damage is not None:
            _set_aside(store, folder, world, tell, str(damage), damage.file)
            continue
        assert content is not None
        state = strategy.state_template(_shapes(folder))
        files.read(state, folder, _group(world))
        strategy.import_state(state)
        return content
    return None


def _worn_out(store: Store, folder: Path) -> str | None:
    crashes = store.crashes(folder)
    return f"{crashes} starts from it crashed" if crashes >= PATIENCE else None


def _verified(
    strategy: Strategy, folder: Path, identity: Identity, world: World
) -> tuple[Manifest | None, DamagedError | None]:
    """The manifest, or the first damage that any rank found. Each rank reads what it is about to load.

    Rank 0 also reads what nobody is about to load.
    """
    content, reads, damage = None, set[str](), None
    try:
        content = manifest.read(folder)
        if content.identity.run != identity.run:
            raise DamagedError(manifest.FILE, f"belongs to another run, {content.identity.run}")
        manifest.verify(folder, content, [files.INDEX])
        reads = files.needed(strategy.state_template(_shapes(folder)), files.index(folder))
        manifest.verify(folder, content, reads)
    except DamagedError as error:
        damage = error
    everyone = world.gather((reads, damage))
    first = next((found for _, found in everyone if found is not None), None)
    if first is None and world.rank == 0 and content is not None:
        try:
            manifest.verify(folder, content, set(content.files).difference(*(part for part, _ in everyone)))
        except DamagedError as error:
            first = error
    return content, world.gather(first)[0]


def _shapes(folder: Path) -> dict[str, Shape]:
    found = files.index(folder).state_dict_metadata
    return {name: (torch.Size(item.size), item.properties.dtype) for name, item in found.items()}  # type: ignore[union-attr]


def _set_aside(store: Store, folder: Path, world: World, tell: Tell, reason: str, file: str) -> None:
    step = int(folder.name.removeprefix("step-"))
    moved, failure = None, None
    if world.rank == 0:
        try:
            moved = store.quarantine(folder, reason)
            store.forget_crashes(folder)
        except OSError:
            failure = traceback.format_exc(limit=1)
    if failure := world.gather(failure)[0]:
        raise RuntimeError(f"{folder.name} ({reason}) could not be moved to {store.aside}: {failure}")
    tell("quarantine", step, {"checkpoint": folder.name, "file": file, "reason": reason, "moved_to": str(moved)})


def _group(world: World) -> dist.ProcessGroup | None:
    return dist.group.WORLD if world.size > 1 else None
