"""One process of the table of families: trains small models as dsft does and compares them with plain transformers.

A cell is COLUMN|NAME METHOD. Those of one process make the model, compare packed with one by one, with recomputation
and with what plain transformers and PEFT give; those of two ranks give losses and norms for the single process's.
"""

import faulthandler
import gc
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dsft_launchers.place import MEETING
from torch import Tensor

from benchmarks.family_models import config_of, kind, make, shape_of
from benchmarks.family_plain import Plain
from benchmarks.family_shapes import LORA_RANKS
from benchmarks.groups import Job, Journal, Progress
from benchmarks.verdicts import differences
from dsft.comm.world import World, join, leave
from dsft.compose import Composed, build, compose
from dsft.data.open import Dataset, open_data
from dsft.data.order import batch_rows
from dsft.engine.assemble import Session, assemble
from dsft.engine.loop import step_batches
from dsft.engine.result import write_result
from dsft.engine.step import train_step
from dsft.examined import family_of, family_on_ranks
from dsft.models.family import Family
from dsft.models.randomness import unkeyed
from dsft.models.small import NoCopyError
from dsft.preflight import preflight

STEPS, BATCH = 3, 4
RATE, EPS = 1e-2, 1e-4
"""Of AdamW for adapters, of plain SGD for the whole model. With AdamW's usual eps, gradients that are but rounding
would be steps: those of a router that chooses one expert, whose weight is 1, say.
"""

REFUSED = re.compile(r"strategy must .*, got ")
"""How dsft refuses a strategy, on every rank before anything is sharded."""

PROMPTS = (5, 40, 12, 30, 8, 50, 3, 25, 20, 35, 15, 45)
"""Letters of each row's prompt; half as many are supervised. The model's windows and chunks are 8 to 16 tokens."""


@dataclass(frozen=True)
class FamilySpec:
    """One cell. place: the folder of models and rows; strategy: single, or that of two ranks."""

    name: str
    method: str
    strategy: str
    place: str

    @property
    def folder(self) -> Path:
        """Where the model lies."""
        return Path(self.place) / "models" / self.name.replace(" ", "_")


def write_rows(path: Path) -> None:
    """The data: one row for each of PROMPTS, of letters that hardly repeat."""
    letters = "the quick brown fox jumps over the lazy dog and runs away from a very large bear, "
    with path.open("w") as out:
        for index, length in enumerate(PROMPTS):
            text = (letters * 3)[7 * index : 7 * index + length + max(4, length // 2)]
            out.write(json.dumps({"prompt": text[:length], "completion": text[length:]}) + "\n")


def words(spec: FamilySpec) -> list[str]:
    """Overrides of the run."""
    rank = LORA_RANKS.get(kind(spec.name).model_type, 4)
    lora = [f"method.rank={rank}", f"method.alpha={2 * rank}", f"optim.eps={EPS}"]
    if kind(spec.name).adapts:
        lora += ["method.target_modules=[all-linear,experts]", "method.expert_rank=3"]
    method = lora if spec.method == "lora" else ["optim.name=sgd"]
    return [
        "model=custom", f"model.path={spec.folder}", f"method={spec.method}", *method, "data=local",
        f"data.path={spec.place}/rows.jsonl", "train.precision=fp32", f"train.steps={STEPS}",
        f"train.global_batch_size={BATCH}", f"optim.lr={RATE}", "optim.schedule=constant",
        "tracker=[none]", f"strategy={spec.strategy}", f"run_dir={spec.place}/none",
    ]  # fmt: skip


def trained(composed: Composed, world: World, family: Family, **changed: Any) -> dict[str, Any]:
    """Losses and norms of a run's steps. changed: settings of train. Collective."""
    session, data = opened(composed, world, family, **changed)
    found = steps(session, data)
    session.run.strategy.close()
    return found


def opened(composed: Composed, world: World, family: Family, **changed: Any) -> tuple[Session, Dataset]:
    """A run before its first step."""
    tree = {**composed.resolved, "train": {**composed.resolved["train"], **changed}}
    run = build(tree)
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=run.train.seed)
    return assemble(run, files, world, STEPS, family=family), data


def steps(session: Session, data: Dataset) -> dict[str, Any]:
    """Losses and gradient norms of its steps. Collective."""
    found = [train_step(session, step_batches(session, data, step)[1], step, 1.0) for step in range(1, STEPS + 1)]
    return {"losses": [each.loss for each in found], "norms": [each.grad_norm for each in found]}


def early(spec: FamilySpec) -> dict[str, str] | Composed:
    """Why there is no such model, or why its run is refused before weights are read, else the run."""
    try:
        config_of(spec.name)
    except Exception as error:  # of any configuration class: dsft gets none of it either
        return {"unmade": _line(error)}
    try:
        make(spec.name, spec.folder)
    except NoCopyError:  # then dsft says why it takes no model of this class
        try:
            family_of(shape_of(spec.name, config_of(spec.name)))
        except ValueError as error:
            return {"refused": str(error)}
        raise
    composed = compose(words(spec))
    try:
        preflight(composed)
    except ValueError as error:
        return {"refused": str(error)}
    return composed


def stilled(session: Any) -> list[str]:
    """Names of the settings of the model's configuration that dsft has set to 0."""
    return [name.rpartition(".")[2] for name in unkeyed(session.files.config)]


def single(spec: FamilySpec, world: World, plain: Plain, place: Path) -> dict[str, Any]:
    """All columns of one process: each the largest relative difference, or {"failed": why}."""
    composed = early(spec)
    if isinstance(composed, dict):
        return composed
    family = family_of(composed.run.model.resolve())
    shutil.rmtree(place, ignore_errors=True)  # an adapter that is left would be loaded into a whole model beside it
    session, data = opened(composed, world, family)
    lora = spec.method == "lora"
    if lora:
        write_result(session, place / "start")
    cell: dict[str, Any] = {"family": family.as_dict(), **steps(session, data)}
    asked = {"attention": "eager", "stilled": stilled(session), "eps": EPS if lora else None, "rate": RATE}
    start = {"base": str(spec.folder), "adapter": str(place / "start") if lora else None}
    if not kind(spec.name).drops:
        cell["plain"] = _against(cell, plain.ask({**asked, **start, "do": "train", "steps": examples(data)}))
    cell["packed"] = _same(cell, trained(composed, world, family, micro_batch_tokens=1))
    if family.recomputes:
        cell["again"] = _same(cell, trained(composed, world, family, gradient_checkpointing="full"))
    write_result(session, place / "result")
    result = {"base": str(spec.folder), "adapter": str(place / "result")}
    if not lora:
        result = {"base": str(place / "result"), "adapter": None}
    ids = [int(token) for token in data.train.example(int(data.train.lengths.argmax()))[0]]
    asked["attention"] = family.library
    cell["export"] = _scored(live(session, ids), plain.ask({**asked, **result, "do": "score", "ids": ids}))
    return cell


def examples(data: Dataset) -> list[list[list[list[int]]]]:
    """Of each step, of each example: its tokens, and 1 for each of those that are learned."""
    found = []
    for step in range(1, STEPS + 1):
        rows = batch_rows(step, seed=0, num_rows=len(data.train), batch_size=BATCH, shuffle=True)
        pairs = (data.train.example(row) for row in rows)
        found.append([[ids.tolist(), learned.astype(int).tolist()] for ids, learned in pairs])
    return found


@torch.no_grad()
def live(session: Session, ids: list[int]) -> Tensor:
    """Logits (T, V) that the model of the run gives for one row."""
    session.model.eval()
    row = torch.tensor([ids])
    call = {"position_ids": torch.arange(len(ids))[None], "segment_lengths": (len(ids),), "use_cache": False}
    logits: Tensor = session.module(input_ids=row, **call).logits[0].float()
    return logits


def _scored(mine: Tensor, answer: dict[str, Any]) -> Any:
    from safetensors.torch import load_file

    if "error" in answer:
        return {"failed": answer["error"]}
    theirs = load_file(answer["logits"])["logits"]
    return float((mine - theirs).abs().max() / mine.abs().max())


def _against(cell: dict[str, Any], answer: dict[str, Any]) -> Any:
    return {"failed": answer["error"]} if "error" in answer else _same(cell, answer)


def _same(cell: dict[str, Any], other: dict[str, Any]) -> float:
    return max(differences(cell, other))


def both(spec: FamilySpec, world: World) -> dict[str, Any]:
    """Losses and norms on two ranks, or why the strategy is refused for this model. Collective."""
    composed = compose(words(spec))
    try:
        return trained(composed, world, family_on_ranks(composed.run.model.resolve(), world))
    except ValueError as error:
        if not REFUSED.match(str(error)):
            raise
        return {"refused": str(error)}


def _run(job: Job, rank: int, world: World, beside: Plain) -> None:
    """All cells of this process, each noted as begun before and in the journal after it."""
    specs = {name: FamilySpec(**spec) for name, spec in job.cells.items()}
    names = list(specs)[rank :: job.ranks] if job.alone else list(specs)
    journal, folder = Journal(Path(job.journal), job.code), Path(job.folder)
    progress, place = Progress(len(names), job.later, time.monotonic()), folder / f"rank-{rank}"
    with beside as plain:
        for index, name in enumerate(names, start=1):
            (folder / f"rank-{rank}.began").write_text(name)
            faulthandler.dump_traceback_later(job.hung, exit=True)
            began = time.monotonic()
            try:
                found = single(specs[name], world, plain, place) if job.alone else both(specs[name], world)
            except Exception as error:  # of any class of transformers: the cell is lost, the table is not
                found = {"crashed": _line(error)}
                if not job.alone:  # the other may wait for what this rank will never send
                    told = {"name": name, "line": _line(error), "at": time.time()}
                    (folder / f"rank-{rank}.error").write_text(json.dumps(told))
                    raise
            gc.collect()
            if world.rank == 0:
                journal.write(name, {**found, "seconds": round(time.monotonic() - began, 2)})
            if rank == 0:
                progress.tell(index, name)
    faulthandler.cancel_dump_traceback_later()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main(plain: Plain | None = None) -> None:
    """family_cells.py JOB: JOB is the JSON of a groups.Job. plain: the process beside it, if it is no usual one."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if job.alone:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", MEETING):
            os.environ.pop(name, None)
    _run(job, rank, join(), plain or Plain())
    leave()


if __name__ == "__main__":
    main()
