"""Scores of a reference for all rows, computed once before the first step and kept in the user's cache.

They replace the values of the reference, which then need no memory, and a forward pass of each step.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsft.cache.remembered import sha256
from dsft.cache.root import cache_root, open_folder
from dsft.checkpoint.digests import of_tensor
from dsft.data.batch import build_batch
from dsft.data.open import Dataset
from dsft.data.packing import plan_step
from dsft.data.tokens import BESIDE, OFFSETS, SCORES, TokenSet
from dsft.engine.assemble import Session
from dsft.objective import START, Batch

AT_ONCE = 1024
"""Rows that are scored between two sums over the ranks."""
MANIFEST = "digests.json"


def score_once(session: Session, data: Dataset) -> Dataset:
    """Return data with the scores of the reference, if the objective asks for that. Collective.

    Read from $DSFT_CACHE where every rank finds them whole, under a key of base, values, data, precision and ranks;
    else computed, and written by one rank of each node. The values of the reference are let go of.
    """
    if not session.run.objective.reference_cache:
        return data
    folder = open_folder(cache_root(), "references") / _key(session, data)
    names = [name for name, part in (("train", data.train), ("eval", data.eval)) if part is not None]
    if not all(session.world.gather(_whole(folder, names))):
        for name in names:
            part = data.train if name == "train" else data.eval
            assert part is not None
            _write(session, folder, name, _scored(session, part))
        if session.world.local_rank == 0:
            digests = {path.name: sha256(path) for path in sorted(folder.glob("*.npy"))}
            (folder / MANIFEST).write_text(json.dumps(digests))
        session.world.barrier()
    del session.roles.values[START]
    held = data.eval and _with(data.eval, folder, "eval")
    return replace(data, train=_with(data.train, folder, "train"), eval=held)


def _key(session: Session, data: Dataset) -> str:
    """Digest of what decides the scores; each rank's part of the values is in it, and so their number."""
    parts = [of_tensor(part.detach().cpu()) for part in session.roles.values[START]]
    run = session.run
    mine = [parts, session.files.digest() if session.world.local_rank == 0 else ""]
    decided = [session.world.gather(mine), data.digest, run.train.precision, repr(run.quantization), repr(run.method)]
    return hashlib.sha256(json.dumps([*decided, run.objective.mismatched]).encode()).hexdigest()[:32]


def _whole(folder: Path, names: Sequence[str]) -> bool:
    """Return True if this rank finds all files as they were written."""
    try:
        known: dict[str, str] = json.loads((folder / MANIFEST).read_text())
        return all(f"{name}-{SCORES}.npy" in known for name in names) and all(
            sha256(folder / name) == digest for name, digest in known.items()
        )
    except (OSError, ValueError):  # never computed, or damaged: it is computed anew
        return False


def _scored(session: Session, tokens: TokenSet) -> dict[str, Tensor]:
    """Array name -> scores of all supervised tokens of a set, and their offsets by example; the same on every rank."""
    names = [SCORES, *([BESIDE] if session.run.objective.mismatched else [])]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    sizes: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, len(tokens), AT_ONCE):
        rows = list(range(start, min(start + AT_ONCE, len(tokens))))
        for name in names:
            scores, counts = _of_rows(session, tokens, rows, beside=name == BESIDE)
            found[name].append(scores)
            sizes[name].append(counts)
    zero = torch.zeros(1, dtype=torch.int64)
    offsets = {f"{name}{OFFSETS}": torch.cat([zero, torch.cat(parts).cumsum(0)]) for name, parts in sizes.items()}
    return {name: torch.cat(parts) for name, parts in found.items()} | offsets


def _of_rows(session: Session, tokens: TokenSet, rows: list[int], *, beside: bool) -> tuple[Tensor, Tensor]:
    """Scores (P,) of these rows in order, on CPU, and supervised tokens per row (E,); beside: of others' answers."""

    def batch_of(chosen: list[int]) -> Batch:
        batch = build_batch(tokens, chosen, mismatched=beside)
        return batch.mismatch() if beside else batch

    ranks = session.run.strategy.data_ranks(session.world)
    padded = rows + [rows[0]] * (ranks - len(rows))  # every rank computes as often
    plan = plan_step(session.lengths(tokens, padded), ranks, session.tokens_at_once)[session.world.rank % ranks]
    batches = [batch_of([padded[i] for i in micro.examples]) for micro in plan]
    counts = _sizes(batch_of(rows))
    ends = counts.cumsum(0).tolist()
    flat = torch.zeros(ends[-1], device=session.world.device)
    for micro, batch, scores in zip(plan, batches, session.roles.score(START, batches), strict=True):
        for i, own in zip(micro.examples, scores.split(_sizes(batch).tolist()), strict=True):
            if not micro.silent and i < len(rows) and session.world.rank < ranks:
                flat[ends[i] - len(own) : ends[i]] = own
    return session.world.sum(flat).cpu(), counts


def _sizes(batch: Batch) -> Tensor:
    """Supervised tokens per example (E,) int64."""
    segments = torch.tensor(batch.answers)
    return torch.stack([part.sum() for part in segments.split(batch.members)])


def _write(session: Session, folder: Path, name: str, arrays: dict[str, Tensor]) -> None:
    if session.world.local_rank == 0:
        folder.mkdir(mode=0o700, exist_ok=True)
        for key, value in arrays.items():
            np.save(folder / f"{name}-{key}.npy", value.numpy())


def _with(tokens: TokenSet, folder: Path, name: str) -> TokenSet:
    """The set with the arrays in folder."""
    paths = sorted(folder.glob(f"{name}-*.npy"))
    more = {path.stem.removeprefix(f"{name}-"): np.load(path, mmap_mode="r") for path in paths}
    return replace(tokens, arrays={**tokens.arrays, **more})
