"""One process of the equality matrix: runs its cells in one warm process group and writes what it measured."""

import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.collectives import Counted, Volume, fake_world
from dsft.comm.world import World, join, leave
from dsft.compose import compose
from dsft.data.open import open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step

STEPS, PLANTED = 10, 2
COUNTED = 3
"""Steps on a fake group: under ZeRO-3 the first two still look at what the model does."""


class LocalCounts(World):
    """A planted fault: the loss is divided by this rank's own count."""

    def sum(self, value: Tensor) -> Tensor:
        return value


@dataclass
class Measured:
    """One cell. base_bytes: summed over ranks; label_ratio: largest over smallest rank's labels.

    examples: fewest and most in a micro-batch of any rank; collectives: what this rank handed to them in the last step.
    """

    losses: list[float]
    norms: list[float]
    base_bytes: int
    label_ratio: float
    examples: tuple[int, int]
    collectives: Volume
    seconds: float


def write_rows(path: Path, batches: int) -> None:
    """Rows in batches of eight, each 14 bytes shorter than the one before; of every four the first and the last are
    nearly all supervised, the others hardly.

    Of four rows, two ranks get 0, 3 and 1, 2, four ranks one each; of eight, two ranks get 0, 3, 4, 7 and the others,
    four ranks 0, 7 and 1, 6 and so on: their label counts differ by more than 2.
    """
    text = "the quick brown fox jumps over the lazy dog and runs away from a very large bear; " * 8
    with path.open("w") as out:
        for batch in range(batches):
            for place, loud in enumerate((True, False, False, True) * 2):
                start, length = 7 * batch + 3 * place, 240 - 14 * place
                ask, answer = (20, length - 20) if loud else (length - 6, 6)
                row = {"question": text[start : start + ask], "answer": text[start + ask : start + ask + answer]}
                out.write(json.dumps(row) + "\n")


def measure(overrides: list[str], world: World, fault: str | None, steps: int) -> Measured:
    """So many optimizer steps of one configuration. Collective."""
    started = time.monotonic()
    composed = compose(overrides)
    files = composed.run.model.resolve()
    data = open_data(composed.run.data, files.tokenizer(), max_length=composed.run.train.max_length, seed=0)
    session = assemble(composed.run, files, world)
    session = _plant(session, fault)
    losses, norms, held, base, ratio, counted = [], [], [], 0, math.inf, Counted()
    for step in range(1, steps + 1):
        _, batches = step_batches(session, data, step)
        labels = float(sum(composed.run.objective.count(batch).sum() for batch in batches))
        counts, sizes = zip(*world.gather((labels, [len(batch.lengths) for batch in batches])), strict=True)
        ratio = min(ratio, max(counts) / max(1.0, min(counts)))
        held += [size for part in sizes for size in part]
        with counted if step == steps else nullcontext():
            result = train_step(session, batches, step, 1.0)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step == 1:
            base = sum(world.gather(base_bytes(session.model)))
    composed.run.strategy.close()
    del session
    gc.collect()
    examples = (min(held), max(held))
    return Measured(losses, norms, base, ratio, examples, counted.found, time.monotonic() - started)


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
    """cells.py JOB: JOB is JSON with cells {name: [overrides, planted fault or null]}, out, and fake.

    fake: the number of ranks of a fake group whose first this process plays; 0: it joins the others.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    world = fake_world(job["fake"]) if job["fake"] else join()
    gc.collect()
    gc.freeze()  # what was imported stays: collections between cells need not look at it
    results: dict[str, Any] = {}
    for name, (overrides, fault) in job["cells"].items():
        try:
            steps = PLANTED if fault else COUNTED if job["fake"] else STEPS
            results[name] = vars(measure(overrides, world, fault, steps))
        except ValueError as error:  # a refused combination is a result
            results[name] = {"refused": str(error)}
        if world.rank == 0:
            Path(job["out"]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
