"""Is it the base that a run knows: by the digest of all its bytes, or by its fingerprint where no more is known.

A large base that was never read is read beside the first steps, by one rank of each node; its digest is known before
the result is published.
"""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft_launchers.verdict import RefusedError

from dsft.folder import base_then_and_now, provenance
from dsft.models.files import code_digest
from dsft.owners import owner_of

if TYPE_CHECKING:
    from dsft.comm.world import World
    from dsft.models.files import ModelFiles

NICE = 10
"""Added to the niceness of the thread that reads: the steps come first."""
TOLD_BYTES = 4 * 2**30
"""A reading of more is announced."""


def digests_of(files: "ModelFiles", *runs: Mapping[str, str]) -> dict[str, str]:
    """base_fingerprint, and base_digest unless it takes long and nothing depends on it yet.

    runs: what is known of runs that are to be of this base (folder.known): where one has a base_digest and the same
    fingerprint, all bytes are read now.
    """
    found = {"base_fingerprint": files.fingerprint()}
    if files.trust_remote_code and files.folder is not None:
        found["base_code"] = code_digest(files.folder)
    wanted = any("base_digest" in run and run["base_fingerprint"] == found["base_fingerprint"] for run in runs)
    if wanted and files.unread > TOLD_BYTES:
        size = f"{files.unread / 2**30:.0f} GiB"
        print(f"dsft: reads {size} of {files.name_or_path} for its digest, which is then remembered", file=sys.stderr)
    whole = files.digest() if wanted else files.digest_at_once()
    return found if whole is None else {**found, "base_digest": whole}


def require_code(model: Any, known: Mapping[str, Any]) -> None:
    """Refuse a model whose own code is not that of the run. Called before any of it runs, and before model.resolve.

    model: of Run; known: provenance of the run's folder. Raises ValueError.
    """
    was = known.get("base_code")
    folder = model.own_code() if was is not None and hasattr(model, "own_code") else None
    if was is not None and folder is not None and (now := code_digest(folder)) != was:
        raise ValueError(
            f"model.path must hold the code with which the run was made, got *.py of {owner_of(folder)} in {folder} "
            f"that were {was[:12]} and are {now[:12]} by their content; put them back, or begin a new run with code "
            "that you trust"
        )


def require_code_on_ranks(model: Any, known: Mapping[str, Any], world: "World") -> None:
    """The same on all ranks, of which some may see other files. Collective. Raises RefusedError on every rank."""
    wrong = None
    try:
        require_code(model, known)
    except (OSError, ValueError) as error:
        wrong = str(error)
    for rank, said in enumerate(world.gather(wrong)):
        if said is not None:
            raise RefusedError(f"rank {rank}: {said}")


def require(run_dir: Path, files: "ModelFiles") -> None:
    """Refuse a base that is not the one on which run_dir was trained. Raises ValueError."""
    run = provenance(run_dir)
    if "base_fingerprint" not in run:
        return
    now = digests_of(files, run) if "base_digest" in run else {"base_fingerprint": files.fingerprint()}
    was, there = base_then_and_now(run, now)
    if was is not None and was != there:
        raise ValueError(
            f"RUN must lie beside the base that it was trained on, got {run_dir}, whose base {files.name_or_path} was "
            f"{was[:12]} and is {there[:12]} by its content; put the model back that it was trained on"
        )


class Basis:
    """The base of this attempt, on all ranks. digest: of all its bytes, None until it is known, and on ranks that do
    not read. Collective.

    Raises RefusedError on every rank if a node has another base than the run was started with.
    """

    def __init__(self, files: "ModelFiles", run_dir: Path, world: "World") -> None:
        self.files, self.world = files, world
        self.thread: threading.Thread | None = None
        self.wrong: str | None = None
        run, mine = provenance(run_dir), dict[str, str]()
        if reads := world.local_rank == 0:
            self.before = files.identities()
            mine = digests_of(files, run)
        self.digest = mine.get("base_digest")
        self.reads, self.noted = reads, "base_digest" in run
        for rank, there in enumerate(world.gather(mine)):
            was, now = base_then_and_now(run, there) if there else (None, "")
            if was is not None and was != now:
                raise RefusedError(
                    f"rank {rank} has another base model than the run was started with, {now[:12]} in place of "
                    f"{was[:12]} by its content; put that model back, or choose another run_dir"
                )

    def read(self, tell: Callable[[str], None] | None) -> None:
        """Begin to read what is not known yet, beside what follows. tell: called with the digest on the rank that
        writes the run's records, None on others; not at all if the run knew it.
        """
        if self.noted:
            return
        if self.digest is not None:
            if tell is not None:
                tell(self.digest)
        elif self.reads:
            self.thread = threading.Thread(target=self._read, args=(tell,), name="base digest", daemon=True)
            self.thread.start()

    def _read(self, tell: Callable[[str], None] | None) -> None:
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
            digest = self.files.digest()
            if self.files.identities() != self.before:  # nobody knows which bytes were loaded
                self.wrong = f"the base {self.files.name_or_path} was changed while the run loaded and read it"
                return
            self.digest = digest
            if tell is not None:
                tell(digest)
        except Exception as error:  # it is raised where all ranks meet, by settle
            self.wrong = f"the base {self.files.name_or_path} could not be read: {type(error).__name__}: {error}"

    def settle(self) -> str:
        """Wait for the digest, the same on all nodes, of a base that is still the one that was loaded. Collective.

        Raises RuntimeError on every rank if it is not.
        """
        if self.thread is not None:
            self.thread.join()
        if self.reads and self.wrong is None and self.files.identities() != self.before:
            if self.files.digest() != self.digest:
                self.wrong = f"the base {self.files.name_or_path} was changed while the run trained on it"
        said = self.world.gather((self.digest, self.wrong))
        if wrong := next((wrong for _, wrong in said if wrong is not None), None):
            raise RuntimeError(f"{wrong}; its digest is not known, so no result is published: start the run again")
        digests = [digest for digest, _ in said if digest is not None]
        for rank, (digest, _) in enumerate(said):
            if digest not in (None, digests[0]):
                raise RuntimeError(f"rank {rank} has another base model than rank 0, by its content; make them alike")
        return digests[0]
