"""Where a run goes on: from the newest verified checkpoint, or from its beginning."""

from pathlib import Path

from dsft.checkpoint.lease import Lease
from dsft.checkpoint.manifest import Identity, folder_name
from dsft.checkpoint.restore import Search, go_back, restore
from dsft.checkpoint.saver import Retention, Saver
from dsft.checkpoint.store import Store
from dsft.engine.assemble import Session
from dsft.engine.keep import Keeper, recall
from dsft.engine.progress import Progress, Watch


def resume(
    session: Session, run_dir: Path, identity: Identity, lease: Lease | None, total: int, watch: Watch
) -> Progress:
    """Load the newest checkpoint that verifies into session, and return where the loop goes on. Collective.

    Unfinished folders of earlier attempts are removed first, if the run is still ours (lease: rank 0's). Raises
    RefusedError if there are checkpoints that cannot be used.
    """
    store = Store(run_dir)
    if lease is not None:
        lease.check(strict=True)
        store.clear()
    session.world.barrier()
    search = Search(store, lease, identity, session.run.optim.name, session.world, watch.event)
    found = restore(session.run.strategy, search)
    if found is None:
        return Progress(total=total)
    at = recall(found.step, total, found.progress, session.run.train)
    if found.identity.data != identity.data:
        at.evaluations.clear()  # of other rows: nothing to compare with
    if found.progress["optimizer"] != search.optimizer:
        watch.event("optimizer_anew", at.step, {"was": found.progress["optimizer"], "now": search.optimizer})
    details = {"checkpoint": folder_name(found.step), "ranks_then": found.world_size, "ranks_now": session.world.size}
    watch.event("resume", at.step, details)
    return at


def back_to_best(
    session: Session, run_dir: Path, identity: Identity, lease: Lease | None, at: Progress, watch: Watch
) -> None:
    """Give session the values of the step with the best evaluation, if checkpoint.keep_best asks for it. Collective."""
    best = at.best_step if session.run.checkpoint.keep_best is not None else None
    if best is None or best == at.step:
        return
    search = Search(Store(run_dir), lease, identity, session.run.optim.name, session.world, watch.event)
    go_back(session.run.strategy, search, best)
    watch.event("back_to_best", best, {"last": at.step})


def keeper_for(session: Session, run_dir: Path, identity: Identity, lease: Lease | None, *, saved: int) -> Keeper:
    """Return the Keeper that saves this run. saved: the step that was resumed from, 0 for none. Collective."""
    config = session.run.checkpoint
    retention = Retention(config.keep, config.keep_every)
    saver = Saver(Store(run_dir), lease, identity, session.world, retention)
    return Keeper(saver, session.run, saved=saved)
