"""One process of the equality matrix: runs its cells in one warm process group and writes what it measured."""

import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsft.comm.world import World, join, leave
from dsft.compose import compose
from dsft.data.open import open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step

STEPS, STEPS_PLANTED = 10, 2


class LocalCounts(World):
    """A planted fault: the loss is divided by this rank's own count."""

    def sum(self, value: Tensor) -> Tensor:
        return value


@dataclass
class Measured:
    """One cell. copies_bytes: the base's bytes summed over ranks; label_ratio: largest over smallest rank's labels."""

    losses: list[float]
    norms: list[float]
    base_bytes: int
    label_ratio: float
    seconds: float


def write_rows(path: Path, batches: int) -> None:
    """Rows in batches of four of falling length; the first and the last nearly all supervised, the others hardly.

    Two ranks get rows 0, 3 and 1, 2; four ranks one each: their label counts differ by more than 2.
    """
    text = "the quick brown fox jumps over the lazy dog and runs away from a very large bear; " * 8
    with path.open("w") as out:
        for batch in range(batches):
            for place, (ask, answer) in enumerate(((20, 220), (220, 6), (200, 6), (20, 140))):
                start = 7 * batch + 3 * place
                row = {"question": text[start : start + ask], "answer": text[start + ask : start + ask + answer]}
                out.write(json.dumps(row) + "\n")


def measure(overrides: list[str], world: World, fault: str | None) -> Measured:
    """Some optimizer steps of one configuration. Collective."""
    started = time.monotonic()
    composed = compose(overrides)
    files = composed.run.model.resolve()
    data = open_data(composed.run.data, files.tokenizer(), max_length=composed.run.train.max_length, seed=0)
    session = assemble(composed.run, files, world)
    session = _plant(session, fault)
    losses, norms, base, ratio = [], [], 0, math.inf
    for step in range(1, (STEPS_PLANTED if fault else STEPS) + 1):
        _, batches = step_batches(session, data, step)
        labels = [float(sum(composed.run.objective.count(batch).sum() for batch in batches)) for _ in (0,)]
        counts = [value for part in world.gather(labels) for value in part]
        ratio = min(ratio, max(counts) / max(1.0, min(counts)))
        result = train_step(session, batches, step, 1.0)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step == 1:
            base = sum(world.gather(base_bytes(session.model)))
    composed.run.strategy.close()
    del session
    gc.collect()
    return Measured(losses, norms, base, ratio, time.monotonic() - started)


def _plant(session: Session, fault: str | None) -> Session:
    world = session.world
    if fault == "local-counts":
        return replace(session, world=LocalCounts(world.rank, world.size, world.local_rank, world.device))
    if fault == "lost-gradients" and world.rank == 1:
        strategy = session.run.strategy
        whole = strategy.backward
        object.__setattr__(strategy, "backward", lambda loss, *, last: whole(loss * 0, last=last))
    return session


def base_bytes(model: nn.Module) -> int:
    """Bytes of the frozen and trained base on this rank: parameters, buffers and tensors kept as attributes."""
    return sum(tensor.nbytes for tensor in _tensors(model))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for module in model.modules():
        held: list[Any] = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
        for value in held:
            if isinstance(value, Tensor) and id(value) not in seen:
                seen.add(id(value))
                yield _local(value)


def _local(value: Tensor) -> Tensor:
    if hasattr(value, "ds_tensor") and value.numel() == 0:  # a parameter that ZeRO-3 has divided
        part: Tensor = value.ds_tensor
        return part
    return value.to_local() if isinstance(value, DTensor) else value


def main() -> None:
    """cells.py JOB: JOB is JSON with cells {name: [overrides, planted fault or null]} and out."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    world = join()
    gc.collect()
    gc.freeze()  # what was imported stays: collections between cells need not look at it
    results: dict[str, Any] = {}
    for name, (overrides, fault) in job["cells"].items():
        try:
            results[name] = vars(measure(overrides, world, fault))
        except ValueError as error:  # a refused combination is a result
            results[name] = {"refused": str(error)}
        if world.rank == 0:
            Path(job["out"]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
