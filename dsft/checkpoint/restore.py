"""Resuming: the newest checkpoint that every rank verifies is loaded; what does not verify is set aside and named."""

import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsft_launchers.verdict import CannotBeginError, RefusedError
from torch import Tensor

from dsft.checkpoint import manifest, pickled, reading, verified
from dsft.checkpoint.lease import Lease
from dsft.checkpoint.manifest import Damage, DamagedError, Identity, Manifest, NewerError
from dsft.checkpoint.store import Store
from dsft.checkpoint.trials import Settled
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


@dataclass(frozen=True)
class Found:
    """A checkpoint that every rank has verified. state: the template, filled from it by what was verified."""

    folder: Path
    content: Manifest
    state: dict[str, Tensor]


def restore(strategy: Strategy, search: Search) -> Manifest | None:
    """Load the newest checkpoint that all ranks verify into strategy; None if there is none. Collective.

    Each file is read once: what is loaded is what was verified, whatever becomes of the file meanwhile. Nothing of the
    run changes before every rank has verified every byte of its own. Raises RefusedError if there are checkpoints and
    none verifies: then all stay where they are. Raises CannotBeginError if a file is damaged for some ranks only, or
    for none at the second look.
    """
    _settle(search, lambda: search.store.settle_trial())
    found, damaged = _choose(strategy, search)
    if found is None and _settle(search, lambda: search.store.trials.acquit("no other checkpoint is there to try")):
        found, damaged = _choose(strategy, search)
    if found is None and damaged:
        folder, damage = damaged[0]
        raise RefusedError(
            f"no checkpoint of {folder.parent.parent} verifies, of {len(damaged)} ({folder.name}: {damage}); all are "
            "where they were: put back one that does, or begin at step 1 by resume.anew=true, which moves checkpoints "
            "and records aside"
        )
    if found is None:
        return None
    strategy.import_state(found.state)
    return found.content


def go_back(strategy: Strategy, search: Search, step: int) -> None:
    """Load the checkpoint of step into strategy. Collective. Raises RefusedError if it is gone or does not verify."""
    folder = search.store.folder / manifest.folder_name(step)
    there = search.world.gather(folder.is_dir())[0]
    found = _verified(strategy, folder, search) if there else Damage(folder.name, "it is gone")
    if not isinstance(found, Found):
        raise RefusedError(
            f"the result must be of step {step}, which has the best evaluation, and its checkpoint {folder} cannot be "
            f"read ({found}); put it back, or take the model of the last step by checkpoint.keep_best=null"
        )
    strategy.import_state(found.state)


def _settle(search: Search, end: Callable[[], Settled | None]) -> bool:
    """Have rank 0 end the trial of a checkpoint, if it is time, and tell of it. Return True if it was ended."""
    settled = None
    if search.lease is not None:
        search.lease.check(strict=True)
        settled = end()
    settled = search.world.gather(settled)[0]
    if settled is not None:
        search.tell(settled.event, settled.step, {**settled.details})
    return settled is not None


def _choose(strategy: Strategy, search: Search) -> tuple[Found | None, list[tuple[Path, Damage]]]:
    """Return the checkpoint to load, and newer ones that are damaged; these are set aside if there is one to load.

    The newest that verifies is set aside as well, to be tried, if two starts from it crashed and an older one verifies.
    """
    folders = search.world.gather(search.store.newest_first())[0]
    found, damaged = _first_whole(strategy, search, folders)
    tried = None
    if found is not None and search.world.gather(search.store.trials.reason(found.folder))[0]:
        tried, rest = found.folder, folders[folders.index(found.folder) + 1 :]
        del found  # and its template
        found, _ = _first_whole(strategy, search, rest)
        if found is None:  # nothing to compare it with
            tried = None
            found, damaged = _first_whole(strategy, search, folders)
    if found is not None:
        for folder, damage in damaged:
            _set_aside(search, folder, str(damage), damage.file)
        if tried is not None:
            _try(search, tried, found.folder)
    return found, damaged


def _first_whole(
    strategy: Strategy, search: Search, folders: Sequence[Path]
) -> tuple[Found | None, list[tuple[Path, Damage]]]:
    """Return the first of folders that every rank verifies, and those before it, which are damaged."""
    damaged: list[tuple[Path, Damage]] = []
    for folder in folders:
        found = _verified(strategy, folder, search)
        if isinstance(found, Found):
            return found, damaged
        damaged.append((folder, found))
    return None, damaged


def _verified(strategy: Strategy, folder: Path, search: Search) -> Found | Damage:
    """Return the checkpoint in folder, with a template to fill, or its first damage. Collective.

    Each rank verifies what it is about to load, rank 0 also what nobody is about to load.
    """
    world = search.world
    content, state, reads, damage, newer = None, dict[str, Tensor](), set[str](), None, None
    try:
        content = _manifest_of(folder, search)
        index = reading.index_of(folder, content)
        whole = content.progress.get("optimizer") == search.optimizer
        held = {name: shape for name, shape in reading.shapes(index).items() if whole or name.startswith(OURS)}
        state = strategy.state_template(held)
        mine = reading.Reading(state, index)
        reads = mine.files
        mine.fill(folder, content)
    except DamagedError as error:
        damage = error.damage
    except NewerError as error:
        newer = f"{error}; go on with that one, or choose another run_dir"
    everyone = world.gather((reads, damage, newer))
    if refusal := next((newer for *_, newer in everyone if newer), None):
        raise RefusedError(refusal)
    needed = set(_own_index(content)).union(*(part for part, *_ in everyone))
    damages = [damage for _, damage, _ in everyone]
    if not any(damages):
        rest = set(content.files if content else ()).difference(needed)
        damages = world.gather(_damage_of(folder, search, rest, needed) if world.rank == 0 else None)
    if any(damages):
        return _witnessed(folder, search, damages, needed)
    assert content is not None
    return Found(folder, content, state)


def _witnessed(folder: Path, search: Search, damages: Sequence[Damage | None], needed: set[str]) -> Damage:
    """Return the first damage, once every rank has seen it. damages: each rank's; needed: files that any of them loads.

    A file that one rank reads right is not damaged: then the node of the other is in trouble, and CannotBeginError
    names it.
    """
    for name in dict.fromkeys(damage.file for damage in damages if damage is not None):
        again = search.world.gather((_damage_of(folder, search, {name}, needed), socket.gethostname()))
        if all(damage is not None for damage, _ in again):
            continue
        rank, why = next(
            (rank, damage.why)
            for rank, (first, (second, _)) in enumerate(zip(damages, again, strict=True))
            for damage in (second, first)
            if damage is not None and damage.file == name
        )
        right = next(rank for rank, (damage, _) in enumerate(again) if damage is None)
        other = f"rank {right} on {again[right][1]}" if right != rank else "the same rank a moment later"
        raise CannotBeginError(
            f"rank {rank} on {again[rank][1]} finds {folder.name} damaged ({name}: {why}), and {other} reads that file "
            "right, so nothing was moved; look at the disk and the mounts there, then start again"
        )
    return next(damage for damage in damages if damage is not None)


def _damage_of(folder: Path, search: Search, names: set[str], needed: set[str]) -> Damage | None:
    """Return what this rank finds wrong with the files called names, or the manifest, which must list the needed."""
    try:
        content = _manifest_of(folder, search)
        verified.require_listed(content, needed)
        if names.intersection((manifest.FILE, pickled.FILE)):
            reading.index_of(folder, content)
        verified.verify(folder, content, names.intersection(content.files))
    except DamagedError as error:
        return error.damage
    except NewerError:  # whole, as far as this goes
        return None
    return None


def _manifest_of(folder: Path, search: Search) -> Manifest:
    content = manifest.read(folder)
    if content.identity.run != search.identity.run:
        raise DamagedError(Damage(manifest.FILE, f"belongs to another run, {content.identity.run}"))
    return content


def _own_index(content: Manifest | None) -> list[str]:
    """Return the name of the file that is the index of a checkpoint, if it is one of its own."""
    return [pickled.FILE] if content is not None and content.index is None else []


def _set_aside(search: Search, folder: Path, reason: str, file: str) -> None:
    moved = _moved(search, folder, reason, lambda: (search.store.set_aside(folder, reason), reason))
    _tell_aside(search, folder, file, moved)


def _try(search: Search, folder: Path, older: Path) -> None:
    moved = _moved(search, folder, "to be tried", lambda: search.store.trials.begin(folder, older))
    _tell_aside(search, folder, "", moved)


def _moved(search: Search, folder: Path, why: str, move: Callable[[], tuple[Path, str]]) -> tuple[Path, str]:
    """Have rank 0 move a checkpoint; return to where, and the reason. Collective."""
    moved, failure = (Path(), ""), None
    if search.lease is not None:
        search.lease.check(strict=True)
        try:
            moved = move()
        except OSError:
            failure = traceback.format_exc(limit=1)
    moved, failure = search.world.gather((moved, failure))[0]
    if failure:
        raise RuntimeError(f"{folder.name} ({why}) could not be moved to {search.store.quarantine.folder}: {failure}")
    return moved


def _tell_aside(search: Search, folder: Path, file: str, moved: tuple[Path, str]) -> None:
    place, reason = moved
    details: dict[str, object] = {"checkpoint": folder.name, "file": file, "reason": reason, "moved_to": str(place)}
    search.tell("quarantine", int(folder.name.removeprefix("step-")), details)
