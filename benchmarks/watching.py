"""What the watch over every phase costs: steps per second with it against train.hang_after=inf, in turns.

python -m benchmarks.watching [--pairs 20]   writes benchmarks/results/watching.md
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from dsft_launchers.local import launch

from benchmarks.machine import here
from benchmarks.matrix_rows import write_rows
from benchmarks.run_folders import words
from dsft.checkpoint.manifest import Identity
from dsft.comm.world import World, join, leave
from dsft.compose import compose
from dsft.data.open import Dataset, open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.evaluate import Evaluation
from dsft.engine.limits import Limits
from dsft.engine.loop import fit
from dsft.engine.patience import Patience
from dsft.engine.progress import Progress
from dsft.engine.resume import keeper_for
from dsft.engine.stop import StopFlag

RANKS, STEPS, WARM, BLOCK = 2, 10**6, 5, 60
WHO = Identity("bench", "config", "base", "data")


class Unheard:
    """A watch that keeps nothing."""

    def begin_step(self) -> None:
        """Ignore it."""

    def step(self, step: int, values: Mapping[str, float], ids: list[str]) -> None:
        """Ignore it."""

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Ignore it."""

    def event(self, event: str, step: int, details: Mapping[str, object]) -> None:
        """Ignore it."""


def rank(folder: Path, pairs: int) -> None:
    """One rank: blocks of steps with the watch and without, in turns; rank 0 writes steps per second of each."""
    world = join()
    case = ["method=lora", "strategy=ddp", "checkpoint=none", "checkpoint.every=0", "launcher=auto"]
    run = compose(words(folder / "rows.jsonl", case, RANKS, background=False, steps=STEPS)).run
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=0)
    session = assemble(run, files, world)
    at = Progress(total=0)
    _block(session, data, world, at, math.inf)  # warms up
    found = []
    for pair in range(pairs):
        order = (math.inf, 10.0) if pair % 2 else (10.0, math.inf)
        pace = {margin: _block(session, data, world, at, margin) for margin in order}
        found.append(f"{pace[10.0]:.3f} {pace[math.inf]:.3f}\n")
    if world.rank == 0:
        (folder / "found").write_text("".join(found))
    leave()


def _block(session: Session, data: Dataset, world: World, at: Progress, margin_s: float) -> float:
    """Steps per second of one block after WARM others, in which the process beside this one starts."""
    with Patience(margin_s, Limits(10**6, 10**5, "cpu")) as patience:
        keeper = keeper_for(session, Path("absent"), WHO, None, saved=at.step)
        at.total = at.step + WARM
        fit(session, data, Unheard(), StopFlag(), keeper, at, patience=patience)
        at.total += BLOCK
        world.barrier()
        begun = time.perf_counter()
        fit(session, data, Unheard(), StopFlag(), keeper, at, patience=patience)
        return BLOCK / (time.perf_counter() - begun)


def main() -> int:
    """Measure and write; 1 if a rank failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--rank", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/watching.md"))
    args = parser.parse_args()
    if args.rank:
        rank(args.rank, args.pairs)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", 60)
        command = [sys.executable, "-m", "benchmarks.watching", "--rank", name, "--pairs", str(args.pairs)]
        code = launch(command, num_processes=RANKS, log_dir=folder / "logs", env={"OMP_NUM_THREADS": "1"})
        if code:
            return code
        found = [tuple(map(float, line.split())) for line in (folder / "found").read_text().splitlines()]
    ratios = sorted(watched / free for watched, free in found)
    middle = [statistics.median(paces) for paces in zip(*found, strict=True)]
    quarter = len(ratios) // 4
    text = f"""# What the watch over every phase costs

Steps per second of a tiny LoRA run on {RANKS} ranks under ddp, in blocks of {BLOCK} steps: with `train.hang_after=10`
(a thread that looks at the phase four times a second, a process beside each rank, a limit around each part of a
step) against `train.hang_after=inf`, in turns.

| | |
|---|---|
| watched, steps per second, median | {middle[0]:.2f} |
| not watched | {middle[1]:.2f} |
| ratio, median of {len(ratios)} pairs | {statistics.median(ratios):.3f} |
| ratio, middle half of the pairs | {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f} |

`python -m benchmarks.watching --pairs {args.pairs}` on {here()}.
"""
    args.out.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
