"""One process of the matrix of faults: damages copies of a run folder, resumes from them, and compares.

All its cells are of one layout. The session is made once; before each cell it is at step 1.
"""

import faulthandler
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.damage_verdicts import Seen, tree, wrong
from benchmarks.damages import STEPS, Damage, damages
from benchmarks.fault_layouts import LAYOUTS, TRAINED, Layout
from benchmarks.groups import Job, Journal, Progress
from benchmarks.plants import FIRED, happened, planted
from dsft import folder
from dsft.checkpoint.digests import of_all, of_tensor
from dsft.checkpoint.lease import Lease, acquire
from dsft.checkpoint.manifest import folder_name
from dsft.checkpoint.saver import Retention, Saver
from dsft.checkpoint.store import Store
from dsft.comm.world import World, join, leave
from dsft.compose import build, compose, load_yaml
from dsft.data.open import open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.keep import remember
from dsft.engine.loop import step_batches
from dsft.engine.progress import Progress as At
from dsft.engine.resume import resume
from dsft.engine.step import train_step
from dsft.preflight import preflight

ALL_HERE_S = 20.0
"""How long a rank waits for the others after a start: one that raised alone leaves them in a collective."""


class Told:
    """A watch that keeps the events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, dict[str, Any]]] = []

    def event(self, event: str, step: int, details: dict[str, Any]) -> None:
        self.events.append((event, step, json.loads(json.dumps(details, default=str))))


class Talk:
    """What the ranks tell each other by files in folder: after an error they may not be at the same collective."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world, self.count = folder, world, 0

    def hear(self, mine: Any) -> list[Any]:
        """What each rank tells. Raises RuntimeError if one tells nothing for ALL_HERE_S."""
        self.count += 1
        paths = [self.folder / f"{self.count}-{rank}.json" for rank in range(self.world.size)]
        fresh = paths[self.world.rank].with_suffix(".tmp")
        fresh.write_text(json.dumps(mine))
        fresh.rename(paths[self.world.rank])
        until = time.monotonic() + ALL_HERE_S
        while not all(path.exists() for path in paths):
            if time.monotonic() > until:
                away = next(rank for rank, path in enumerate(paths) if not path.exists())
                raise RuntimeError(f"rank {away} waits for others, of which one says {mine}"[:400])
            time.sleep(0.005)
        return [json.loads(path.read_text()) for path in paths]


@dataclass(frozen=True)
class Bench:
    """What all cells of this process share. place: a folder for copies; digests: step -> each rank's."""

    session: Session
    world: World
    source: Path
    place: Path
    talk: Talk
    digests: dict[int, list[str]]


def train(layout: Layout, run: Path, world: World) -> dict[str, Any]:
    """Make the run folder of a layout: six steps, a checkpoint of each of STEPS. Collective."""
    words = [*layout.words(run.parent / "rows.jsonl", writes=True), f"run_dir={run}"]
    if world.rank == 0:
        shutil.rmtree(run, ignore_errors=True)
        composed = compose(words)
        prepared = preflight(composed)
        assert prepared is not None
        folder.create(run, composed, prepared["plan"], prepared["digests"])
    world.barrier()
    session = _session(words, world)
    config, files = session.run, session.files
    data = open_data(config.data, files.tokenizer(), max_length=config.train.max_length, seed=config.train.seed)
    who = folder.identity(run, load_yaml(run / "config.yaml"))
    lease = _leased(run) if world.rank == 0 else None
    saver = Saver(Store(run), lease, who, world, Retention(9, 0))
    for step in range(1, STEPS[-1] + 1):
        result = train_step(session, step_batches(session, data, step)[1], step, 1.0)
        if world.rank == 0:
            with (run / "metrics.jsonl").open("a") as out:
                out.write(json.dumps({"step": step, "loss": result.loss}) + "\n")
        if step in STEPS:
            progress = remember(At(step=step, total=STEPS[-1]), config.optim.name)
            saver.start(step, config.strategy.export_state, progress, background=False)
            outcome = saver.take()
            assert outcome is not None
            assert outcome.error is None, outcome.error
    return {"wrong": [], "seconds": 0.0}


def _session(words: Sequence[str], world: World) -> Session:
    run = build(compose(words).resolved)
    return assemble(run, run.model.resolve(), world)


def _leased(run: Path) -> Lease:
    return acquire(run / "checkpoints", os.environ)[0]


def digest(session: Session) -> str:
    """Of all that this rank holds of what learns: parameters, buffers, moments. Collective."""
    held = {f"live/{name}": value for name, value in session.model.state_dict(keep_vars=True).items()}
    held |= session.run.strategy.export_state()
    return of_all({name: of_tensor(_mine(value)) for name, value in held.items() if isinstance(value, torch.Tensor)})


def _mine(value: Any) -> torch.Tensor:
    value = getattr(value, "ds_tensor", value)  # a parameter that ZeRO-3 has divided
    local = value.to_local() if hasattr(value, "to_local") else value
    tensor: torch.Tensor = local.detach().cpu()
    return tensor


def resumed(bench: Bench, run: Path, watch: Told) -> int:
    """Resume from a run folder; the step that was loaded. Collective."""
    who = folder.identity(bench.source, load_yaml(bench.source / "config.yaml"))
    lease = _leased(run) if bench.world.rank == 0 else None
    at = resume(bench.session, run, who, lease, STEPS[-1] + 3, watch)  # type: ignore[arg-type]
    return at.step


def undamaged(bench: Bench, step: int) -> list[str]:
    """Load step from a folder in which it is the newest, and whole; each rank's digest. Collective."""
    run = _copied(bench, f"only-{step}", [later for later in STEPS if later > step])
    found = resumed(bench, run, Told())
    assert found == step, f"loads step {found} from a whole folder, should load {step}"
    return bench.world.gather(digest(bench.session))


def _copied(bench: Bench, name: str, without: Sequence[int] = ()) -> Path:
    """A copy of the run folder, made by rank 0, without some checkpoints. Collective."""
    run = bench.place / name / "run"
    if bench.world.rank == 0:
        shutil.rmtree(run.parent, ignore_errors=True)
        left_out = shutil.ignore_patterns(*(folder_name(step) for step in without))
        shutil.copytree(bench.source, run, symlinks=True, ignore=left_out)
    bench.world.barrier()
    return run


def cell(bench: Bench, damage: Damage) -> dict[str, Any]:
    """What the journal keeps of one damage. Collective."""
    began, world = time.monotonic(), bench.world
    run = _copied(bench, "damaged")
    resumed(bench, bench.place / f"only-{STEPS[0]}" / "run", Told())
    if world.rank == 0:
        damage.do(run)
    world.barrier()
    before, watch, step, said = tree(run) if world.rank == 0 else {}, Told(), 0, ""
    fired = bench.place / f"fired-{world.rank}"
    fired.unlink(missing_ok=True)
    os.environ[FIRED] = str(fired)
    world.barrier()
    try:
        with planted(*damage.plants):
            step = resumed(bench, run, watch)
    except Exception as error:  # what a start raises is what is looked at
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        error.__traceback__ = None  # whose frames would keep templates alive
    parts = bench.talk.hear((said, len(happened(fired)), step))
    held = world.gather(digest(bench.session))
    after = tree(run) if world.rank == 0 else {}
    everyone = [part[0] for part in parts]
    seen = Seen(parts[0][2], everyone, held, watch.events, before, after, sum(part[1] for part in parts))
    found = wrong(damage, seen, bench.digests[damage.step or STEPS[0]])
    seconds = round(time.monotonic() - began, 2)
    return {"wrong": found, "loaded": seen.step or None, "said": everyone[0][:300], "seconds": seconds}


def _run(job: Job, world: World) -> None:
    """All cells of the group, each noted as begun before and in the journal after it."""
    (layout,) = {LAYOUTS[spec["layout"]] for spec in job.cells.values()}
    journal, shared, bench = Journal(Path(job.journal), job.code), Path(job.folder), None
    progress = Progress(len(job.cells), job.later, time.monotonic())
    known = {damage.name: damage for damage in damages(world.size, layout.files)}
    for index, (name, spec) in enumerate(job.cells.items(), start=1):
        (shared / f"rank-{world.rank}.began").write_text(name)
        faulthandler.dump_traceback_later(job.hung, exit=True)
        source = Path(spec["place"])
        try:
            if spec["damage"] == TRAINED:
                found = train(layout, source, world)
            else:
                bench = bench or _bench(layout, source, world, shared)
                found = cell(bench, known[spec["damage"]])
        except Exception as error:
            line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            told = {"name": name, "line": line, "at": time.time()}
            (shared / f"rank-{world.rank}.error").write_text(json.dumps(told))
            raise
        if world.rank == 0:
            journal.write(name, found)
            progress.tell(index, name)
    faulthandler.cancel_dump_traceback_later()


def _bench(layout: Layout, source: Path, world: World, shared: Path) -> Bench:
    words = layout.words(source.parent / "rows.jsonl", writes=False)
    bench = Bench(_session(words, world), world, source, shared / "copies", Talk(shared, world), {})
    bench.digests.update({step: undamaged(bench, step) for step in (*STEPS[1:], STEPS[0])})
    assert len({tuple(each) for each in bench.digests.values()}) == len(STEPS), "two steps have one state"
    return bench


def main() -> None:
    """fault_cells.py JOB: JOB is the JSON of a groups.Job."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    world = join()
    gc.freeze()
    _run(job, world)
    leave()


if __name__ == "__main__":
    main()
