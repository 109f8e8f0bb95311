"""One process of the equality matrix: runs its cells in one warm process group and writes what it measured."""

import faulthandler
import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dsft_launchers.place import MEETING
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.collectives import Counted, Volume, fake_world
from benchmarks.groups import Job, Journal, Progress, Spec
from benchmarks.planted import plant
from benchmarks.refusals import refusal, refused
from benchmarks.routing import Routing
from dsft.comm.world import World, join, leave
from dsft.compose import build, compose
from dsft.config import Run
from dsft.data.open import open_data
from dsft.engine.assemble import assemble
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step
from dsft.objective import Batch

PLANTED = 2
"""Steps of a cell with a fault."""
MOVES = 0.01
"""Of the loss, in those steps: one that moves less proves nothing."""
COUNTED = 3
"""Steps on a fake group: under ZeRO-3 the first two still look at what the model does."""

AT_ONCE = 16
"""Cells that the ranks compose together."""

ALONE = World(0, 1, 0, torch.device("cpu"))


@dataclass
class Measured:
    """One cell. base_bytes: summed over ranks; label_ratio: largest over smallest rank's labels, or examples.

    gaps: how near a router was to another choice, per step, on this rank (see Routing).
    examples: fewest and most in a micro-batch of any rank; collectives: what this rank handed to them in the last step;
    rate: the learning rate that was taken; seconds: by the clock; cpu: those of this process.
    """

    losses: list[float]
    norms: list[float]
    gaps: list[float]
    base_bytes: int
    label_ratio: float
    examples: tuple[int, int]
    collectives: Volume
    rate: float
    seconds: float
    cpu: float

    @property
    def moved(self) -> float:
        """How far the loss went, of what it was."""
        return abs(self.losses[0] - self.losses[-1]) / self.losses[0]


def measure(run: Run, world: World, job: Job, fault: str | None = None, steps: int = Spec.steps) -> Measured:
    """So many optimizer steps of one configuration, fewer with a fault or on a fake group. Collective."""
    started, before = time.monotonic(), time.process_time()
    files = run.files()
    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=0, wants=run.objective.wants)
    session = plant(assemble(run, files, world), fault)
    steps = PLANTED if fault else COUNTED if job.fake else steps
    micro = [step_batches(session, data, step)[1] for step in range(1, steps + 1)]
    labels = [_labels(batches) for batches in micro]
    labels, sizes = zip(*world.gather((labels, [len(b.ids) for batches in micro for b in batches])), strict=True)
    losses, norms, gaps, base, counted = [], [], [], 0, Counted()
    for step, batches in enumerate(micro, start=1):
        with counted if job.counted and step == steps else nullcontext(), Routing(session.model) as routing:
            result = train_step(session, batches, step, 1.0)
        gaps.append(routing.gap)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if step == 1:
            base = sum(world.gather(base_bytes(session.model)))
    run.strategy.close()
    del session
    gc.collect()
    gc.freeze()  # what is left is the libraries' own, and large: the next collections need not look at it
    held = [size for part in sizes for size in part]
    return Measured(
        losses=losses,
        norms=norms,
        gaps=gaps,
        base_bytes=base,
        label_ratio=min(_ratio(step) for step in zip(*labels, strict=True)),
        examples=(min(held), max(held)),
        collectives=counted.found,
        rate=run.optim.lr,
        seconds=time.monotonic() - started,
        cpu=time.process_time() - before,
    )


def _labels(batches: Sequence[Batch]) -> tuple[int, int]:
    """Supervised tokens and examples of a rank's micro-batches that count."""
    ours = [batch for batch in batches if batch.counts]
    return max(1, sum(sum(batch.answers) for batch in ours)), max(1, sum(len(batch.ids) for batch in ours))


def _ratio(ranks: Sequence[tuple[int, int]]) -> float:
    """Largest over smallest of the ranks, of the one that differs more."""
    return max(max(counts) / min(counts) for counts in zip(*ranks, strict=True))


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


def cell(spec: Spec, tree: dict[str, Any], world: World, job: Job) -> dict[str, Any]:
    """What the journal keeps of a cell: measured at the first rate that moves the loss, else at the last; or refused.

    Only what refuses a run before its weights are loaded is a refusal. Any other ValueError is a crash, and raised.
    """
    for rate in spec.rates:
        tree["optim"]["lr"] = rate
        try:
            found = measure(build(tree), world, job, spec.fault, spec.steps)
        except ValueError as error:
            said = refusal(spec.words)
            if said is None or said["refused"] != str(error):
                raise
            return said
        if found.moved >= MOVES:
            break
    return vars(found)


def _trees(specs: list[Spec], world: World) -> list[dict[str, Any]]:
    """What each was composed to, or {"refused": why} or {"crashed": error}: the ranks share them out, as Hydra takes
    a tenth of a cell's time. Collective.
    """
    mine = {index: _tree(specs[index].words) for index in range(world.rank, len(specs), world.size)}
    found = {index: tree for part in world.gather(mine) for index, tree in part.items()}
    return [found[index] for index in range(len(specs))]


def _tree(words: Sequence[str]) -> dict[str, Any]:
    try:
        return compose(words).resolved
    except ValueError as error:
        return refused(error)
    except Exception as error:  # of any library
        return {"crashed": _line(error)}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _join(job: Job) -> World:
    """The world of this process. alone: of its own, and what composes a run is told of no other."""
    if job.alone:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", MEETING):
            os.environ.pop(name, None)
    return fake_world(job.ranks) if job.fake else join()


def _run(job: Job, rank: int, world: World) -> None:
    """All cells of this process, each noted as begun before and in the journal after it."""
    specs = {name: Spec(**spec) for name, spec in job.cells.items()}
    names = list(specs)[rank :: job.ranks] if job.alone else list(specs)
    journal, folder = Journal(Path(job.journal), job.code), Path(job.folder)
    progress = Progress(len(names), job.later, time.monotonic())
    for index, name in enumerate(names):
        if index % AT_ONCE == 0:
            some = names[index : index + AT_ONCE]
            trees = _trees([specs[one] for one in some], ALONE if job.fake else world)
        (folder / f"rank-{rank}.began").write_text(name)
        faulthandler.dump_traceback_later(job.hung, exit=True)
        found = trees[index % AT_ONCE]
        try:
            if "refused" not in found and "crashed" not in found:
                found = cell(specs[name], found, world, job)
        except Exception as error:  # of any library: the cell is lost, the matrix is not
            found = {"crashed": _line(error)}
            if not job.alone:  # the others may wait for what this rank will never send
                told = {"name": name, "line": _line(error), "at": time.time()}
                (folder / f"rank-{rank}.error").write_text(json.dumps(told))
                raise
        if world.rank == 0:
            journal.write(name, found)
        if rank == 0:
            progress.tell(index + 1, name)
    faulthandler.cancel_dump_traceback_later()


def main() -> None:
    """cells.py JOB: JOB is the JSON of a groups.Job."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    world = _join(job)
    gc.collect()
    gc.freeze()
    gc.disable()  # a cell is collected at its end, and no cell is large
    _run(job, rank, world)
    leave()


if __name__ == "__main__":
    main()
