"""Where a run goes on: from the newest verified checkpoint, or from its beginning."""

from pathlib import Path

from dsft.checkpoint.lease import Lease
from dsft.checkpoint.manifest import Identity, folder_name
from dsft.checkpoint.restore import restore
from dsft.checkpoint.saver import Retention, Saver
from dsft.checkpoint.store import Store
from dsft.engine.assemble import Session
from dsft.engine.keep import Keeper, recall
from dsft.engine.progress import Progress, Watch


def resume(session: Session, run_dir: Path, identity: Identity, total: int, watch: Watch) -> Progress:
    """Load the newest checkpoint that verifies into session, if there is one. Collective.

    Unfinished folders of earlier attempts are removed first; the lease must have been taken.
    """
    store = Store(run_dir)
    if session.world.rank == 0:
        store.clear()
    session.world.barrier()
    found = restore(session.run.strategy, store, identity, session.world, watch.event)
    if found is None:
        return Progress(total=total)
    at = recall(found.step, total, found.progress)
    details = {"checkpoint": folder_name(found.step), "ranks_then": found.world_size, "ranks_now": session.world.size}
    watch.event("resume", at.step, details)
    return at


def keeper_for(session: Session, run_dir: Path, identity: Identity, lease: Lease | None, *, saved: int) -> Keeper:
    """What saves this run. saved: the step that was resumed from, 0 for none. Collective."""
    config = session.run.checkpoint
    retention = Retention(config.keep, config.keep_every)
    saver = Saver(Store(run_dir), lease, identity, session.world, retention)
    return Keeper(saver, session.run.strategy, config, saved=saved)
