"""Saving: written beside the training or in its way, seen alike by all ranks, at most one at a time."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsft.checkpoint import files
from dsft.checkpoint.copies import Copies
from dsft.checkpoint.index import Index
from dsft.checkpoint.lease import Lease, LeaseLostError
from dsft.checkpoint.manifest import Identity, Manifest, Written
from dsft.checkpoint.store import Store
from dsft.checkpoint.trials import Settled
from dsft.comm.world import World


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a save. error: why it failed (one line); lost: because another process writes this run now.

    seconds: from request to commit; stall_s: of these, how long the training waited. settled: how the trial of another
    checkpoint ended by this one.
    """

    step: int
    nbytes: int = 0
    seconds: float = 0.0
    stall_s: float = 0.0
    deleted: tuple[int, ...] = ()
    settled: Settled | None = None
    error: str | None = None
    lost: bool = False


@dataclass(frozen=True)
class Retention:
    """The newest keep checkpoints stay, and the first of each keep_every steps (0: none besides)."""

    keep: int
    keep_every: int


class Saver:
    """Writes checkpoints of one run. lease: rank 0's. Every method is called by all ranks alike."""

    def __init__(
        self, store: Store, lease: Lease | None, identity: Identity, world: World, retention: Retention
    ) -> None:
        self.store, self.lease, self.identity, self.retention = store, lease, identity, retention
        # a group of its own: the training's collectives go on meanwhile
        self.world = replace(world, group=dist.new_group(backend="gloo") if world.size > 1 else None)
        self.copies = Copies(pinned=world.device.type == "cuda")
        self.copied, self.stall = Event(), 0.0
        self.thread: Thread | None = None
        self.outcome: Outcome | None = None
        self.crash: BaseException | None = None
        self.in_flight_since: tuple[int, float] | None = None
        """Step and time.monotonic() of the beginning of the save that this rank is in; None between saves."""
        self.exempt: frozenset[int] = frozenset()
        self.longest_s = 0.0
        """Seconds of the longest save so far, whatever became of it."""

    @property
    def busy(self) -> bool:
        """A save is in flight on this rank."""
        return self.thread is not None and self.thread.is_alive()

    def start(
        self, step: int, export: Callable[[], Mapping[str, Tensor]], progress: Mapping[str, Any], *, background: bool,
        exempt: frozenset[int] = frozenset(),
    ) -> None:  # fmt: skip
        """Save what export gives; with background a thread copies and writes it: call settle before it changes.

        Nothing may be in flight. exempt: steps whose checkpoints stay, whatever the retention says.
        """
        self.exempt = exempt
        assert self.thread is None, "take the last outcome first"
        begun = time.monotonic()
        self.in_flight_since = step, begun
        if not background:
            with self._timed(begun):
                self.outcome = self._save(step, export(), progress)
            self.stall = time.monotonic() - begun
            self.outcome = replace(self.outcome, seconds=self.stall)
            return
        self.copied.clear()
        lent = [export()]  # let go of once copied: a strategy may have gathered it for this
        beside = _beside(self.world.device)

        def work() -> None:
            try:
                with self._timed(begun):
                    with beside:
                        copied = self.copies.take(lent.pop())
                    self.copied.set()
                    outcome = self._save(step, copied, progress)
                    self.outcome = replace(outcome, seconds=time.monotonic() - begun)
            except BaseException as error:  # handed to the training's thread, which raises it
                self.crash = error
            finally:
                self.copied.set()

        self.thread = Thread(target=work, name=f"save-{step}", daemon=True)
        self.thread.start()
        self.stall = time.monotonic() - begun

    @contextlib.contextmanager
    def _timed(self, begun: float) -> Iterator[None]:
        try:
            yield
        finally:
            self.longest_s = max(self.longest_s, time.monotonic() - begun)
            self.in_flight_since = None

    def settle(self) -> None:
        """Return once the state of a save in flight has been copied, so that it may change."""
        if self.thread is not None and not self.copied.is_set():
            begun = time.monotonic()
            self.copied.wait()
            self.stall += time.monotonic() - begun
        if self.crash is not None:  # on this rank alone: the others wait for it in the save
            raise self.crash

    def ended(self, within_s: float) -> bool:
        """Wait for the save in flight for so long at most; True if none is any more."""
        if self.thread is not None:
            self.thread.join(within_s)
        return not self.busy

    def take(self) -> Outcome | None:
        """Wait for the save in flight, if there is one; its outcome, once. Raises LeaseLostError or its crash."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.crash is not None:
            raise self.crash
        outcome, self.outcome = self.outcome, None
        if outcome is not None and outcome.lost:
            raise LeaseLostError(outcome.error)
        return outcome and replace(outcome, stall_s=self.stall)

    def _save(self, step: int, state: Mapping[str, Tensor], progress: Mapping[str, Any]) -> Outcome:
        """The protocol: files, hashes, manifest, rename. The same outcome on every rank."""
        place, failed = self.world.gather(self._begin(step))[0]
        if failed is not None:
            return failed
        written: dict[str, Written] = {}
        index: Index = {}
        error = None
        try:
            written, index = files.write(state, place, step, self.identity.run, self.world.group)
        except Exception as failure:  # of this rank alone: the others wait below
            error = str(failure) if isinstance(failure, OSError) else repr(failure)
        parts = self.world.gather((written, error))
        outcome = Outcome(step=step, error=next((said for _, said in parts if said is not None), None))
        if self.lease is not None:
            content = Manifest(
                step=step,
                identity=self.identity,
                world_size=self.world.size,
                lease=self.lease.token,
                progress=progress,
                files={name: file for part, _ in parts for name, file in part.items()},
                index=index,
            )
            outcome = self._finish(place, content, outcome, self.lease)
        return self.world.gather(outcome)[0]

    def _begin(self, step: int) -> tuple[Path, Outcome | None]:
        """Rank 0: the folder to write into, or why there is none."""
        if self.lease is not None:
            try:
                self.lease.check(strict=True)
                self.store.clear()  # what a failing disk would not let go of
                return self.store.begin(step), None
            except LeaseLostError as error:
                return Path(), Outcome(step=step, error=str(error), lost=True)
            except OSError as error:
                return Path(), Outcome(step=step, error=str(error))
        return Path(), None

    def _finish(self, place: Path, content: Manifest, outcome: Outcome, lease: Lease) -> Outcome:
        """Rank 0: commit and tidy up, or leave nothing behind."""
        try:
            if outcome.error is None:
                self.store.commit(place, content, lease)
                settled, deleted = self._tidy(content.step)
                return replace(outcome, nbytes=content.nbytes, settled=settled, deleted=deleted)
        except OSError as error:
            outcome = replace(outcome, error=str(error))
        except LeaseLostError:
            pass  # found again below
        shutil.rmtree(place, ignore_errors=True)
        try:
            lease.check()  # a newer writer removes what this one has not finished: then that is the reason
        except LeaseLostError as error:
            outcome = replace(outcome, error=str(error), lost=True)
        return outcome

    def _tidy(self, step: int) -> tuple[Settled | None, tuple[int, ...]]:
        """End a trial, delete what need not stay; what the disk does not let go of stays, and the save counts."""
        settled, deleted = None, tuple[int, ...]()
        with contextlib.suppress(OSError):
            settled = self.store.settle_trial()
        with contextlib.suppress(OSError):
            deleted = tuple(self.store.retain(self.retention.keep, self.retention.keep_every, {step, *self.exempt}))
        return settled, deleted


def _beside(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """For a thread: a stream of its own on device, after what this thread has queued; nothing off an accelerator."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return _on(stream)


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    # The device is one per thread, and GPU 0 in a new one: going back to it, as torch does at the end of a stream's
    # context, would leave a context of this process on it (half a GiB).
    torch.cuda.set_device(stream.device)
    with torch.cuda.stream(stream):
        yield
