"""Whole steps on a device that is not the host: each cell of methods, quantizations and strategies, without a GPU.

python -m benchmarks.blind JOB: JOB is a file with a Job as JSON; prints one line of JSON per cell. A cell is two
optimizer steps of two micro-batches (three where a method prunes after the second), the copies of a save and, where
this process is alone, the state taken over again, the result, its probe and an evaluation if there are rows for it. The
device is the machine's last one, or of sham_cuda's two where it has none: so what works on the first one by accident is
found as well. Ranks are those of torch's fake group: what others would give is a copy of this one's own.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import sham_cuda
from benchmarks.collectives import fake_world
from benchmarks.refusals import refused
from benchmarks.strays import planted
from benchmarks.syncs import Syncs
from dsft.checkpoint.copies import Copies
from dsft.comm.world import World, leave
from dsft.compose import compose
from dsft.config import Run
from dsft.data.open import Dataset, open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.evaluate import evaluate
from dsft.engine.loop import step_batches
from dsft.engine.probe import probe_row, write_probe
from dsft.engine.result import write_result
from dsft.engine.step import train_step

WORDS = (
    "data=reasoning_gym", "data.size=32", "data.eval_size=0", "train.steps=10", "train.precision=fp32",
    "train.micro_batch_tokens=60", "optim.lr=1e-3", "optim.schedule=constant",
)  # fmt: skip
"""Of every cell: examples of 40 to 60 tokens, one to a micro-batch."""


@dataclass(frozen=True)
class Job:
    """cells: name -> what is composed besides WORDS; ranks of the fake group; cache: where the device's library is.

    host: the cells run on the CPU, and there is no other device. strays: cell -> what is planted in it, see strays.py.
    """

    cells: Mapping[str, Sequence[str]]
    ranks: int
    cache: str
    host: bool = False
    strays: Mapping[str, str] = field(default_factory=dict)


def main() -> None:
    """Run the cells of a job."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    world = begin(job)
    gc.collect()
    gc.freeze()  # what is left is the libraries' own, and large
    for name, words in job.cells.items():
        with planted(job.strays[name]) if name in job.strays else nullcontext():
            print(json.dumps({"name": name, **cell(words, world, steps_alone=name in job.strays)}), flush=True)
        gc.collect()
    leave()


def begin(job: Job) -> World:
    """The world of this process, on the device."""
    import bitsandbytes  # noqa: F401  # imported on a machine with CUDA it looks for kernels of its own
    import peft  # noqa: F401

    torch.set_num_threads(1)
    if job.host:
        return fake_world(job.ranks)
    if not torch.cuda.is_available():
        sham_cuda.begin(Path(job.cache))
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.cuda.set_device(device)
    return replace(fake_world(job.ranks), device=device)


def cell(words: Sequence[str], world: World, *, steps_alone: bool = False) -> dict[str, Any]:
    """Return losses, norms, and of the last step micro_batches and waits (see Syncs); or refused and by; or error.

    steps_alone: nothing is saved.
    """
    try:
        run = compose([*WORDS, f"train.global_batch_size={2 * world.size}", *words]).run
    except ValueError as error:
        return refused(error)
    try:
        return measured(run, world, steps_alone=steps_alone)
    except Exception as error:  # of any library: it is what the cell is made for
        return {"error": f"{type(error).__name__}: {error}"}


def measured(run: Run, world: World, *, steps_alone: bool) -> dict[str, Any]:
    """The cell's numbers."""
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=0)
    session = assemble(run, files, world)
    # ZeRO-3 looks once more at what the model does, since the self-test of packing called it in another way
    steps = 2 + int(run.method.guides) + int(run.strategy.reentrant_recompute)
    syncs, results, batches = Syncs(), [], []
    for step in range(1, steps + 1):
        batches = step_batches(session, data, step)[1]
        with syncs if step == steps else nullcontext():
            world.max(0.0)  # as the loop asks before each step whether to stop
            results.append(train_step(session, batches, step, 1.0))
    if not steps_alone:
        saved = copied(session)
        if world.size == 1:
            finished(session, data, saved)
    run.strategy.close()
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "micro_batches": len(batches),
        "waits": dict(syncs.found),
    }


def finished(session: Session, data: Dataset, saved: Mapping[str, Tensor]) -> None:
    """What a resume does with what was saved, and the end of a run: result, probe, evaluation if there are rows."""
    taken_over(session, saved)
    with tempfile.TemporaryDirectory() as folder:
        write_result(session, Path(folder) / "adapter")
        row = probe_row(session.files.config.get_text_config(), data.train, session.run.train.max_length, 0)
        write_probe(session, row, Path(folder) / "probe", "")
    if data.eval is not None:
        evaluate(session, data)


def copied(session: Session) -> Mapping[str, Tensor]:
    """What a save copies to the host; twice, as from the second time on the memory for it is there."""
    copies = Copies(pinned=session.world.device.type == "cuda")
    copies.take(session.run.strategy.export_state())
    return copies.take(session.run.strategy.export_state())


def taken_over(session: Session, saved: Mapping[str, Tensor]) -> None:
    """What a resume does with it. Of a fake group no rank has what the others have saved."""
    strategy = session.run.strategy
    taken = strategy.state_template({name: (value.shape, value.dtype) for name, value in saved.items()})
    for name, value in taken.items():
        _local(value).copy_(_local(saved[name]))
    strategy.import_state(taken)


def _local(value: Any) -> Tensor:
    part: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return part


if __name__ == "__main__":
    main()
