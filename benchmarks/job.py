"""What every peer of a speed benchmark shares: what it is asked for, the clock of its steps, what it leaves behind.

The standard library alone: a peer in another environment imports it too.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

BATCH, RATE, LENGTH, RANK = 8, 2e-4, 512, 16
"""Examples a step over all ranks, learning rate, longest example, rank of the adapters (alpha is twice that)."""


@dataclass(frozen=True)
class Job:
    """model: a folder; rows: a .jsonl with question and answer; setting: which of the peer's, of strategy for ranks."""

    mode: str
    model: str
    rows: str
    steps: int
    precision: str
    setting: str

    def read(self) -> list[dict[str, str]]:
        """The rows in file order."""
        return [json.loads(line) for line in Path(self.rows).read_text().splitlines()]


@dataclass
class Step:
    """This rank's part. tokens: real ones; positions: all that it computed; CPU seconds: of all threads.

    The mean of loss over the ranks is in nats per supervised token.
    """

    tokens: int
    supervised: int
    positions: int
    seconds: float
    cpu_seconds: float
    loss: float


class Turns:
    """Peers that run side by side take their steps in turns: who has done fewest goes next, all others sleep.

    A peer is all its ranks, and has done what each of them has.
    """

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self.folder, self.index, self.count = folder, index, count
        self.rank, self.size = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))

    def wait(self, done: float) -> None:
        """Say that done steps are over, and return once it is this peer's turn; at once if it has no more."""
        fresh = self.folder / f".turn-{self.index}-{self.rank}"
        fresh.write_text(str(done))
        fresh.replace(self.folder / f"turn-{self.index}-{self.rank}")
        while done != math.inf and not self._next(done):
            time.sleep(0.01)

    def _next(self, done: float) -> bool:
        """Whether all ranks of this peer have done as much, and no peer has done less."""
        whole = [(self._done(peer), peer) for peer in range(self.count)]
        return min(whole) == (done, self.index)

    def _done(self, peer: int) -> float:
        paths = [self.folder / f"turn-{peer}-{rank}" for rank in range(self.size)]
        return min(float(path.read_text()) if path.exists() else 0.0 for path in paths)


class Clock:
    """Collects steps; one begins where the last ended, or with this peer's turn."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.turns = turns()
        self.begin()

    def begin(self) -> None:
        """The next step begins now."""
        self.wall, self.cpu = time.perf_counter(), _cpu()

    def end(self, tokens: int, supervised: int, positions: int, loss: float) -> None:
        """A step is over."""
        seconds, cpu = time.perf_counter() - self.wall, _cpu() - self.cpu
        self.steps.append(Step(tokens, supervised, positions, seconds, cpu, loss))
        if self.turns:
            self.turns.wait(len(self.steps))
        self.begin()


def turns() -> Turns | None:
    """What BENCH_TURNS says: a folder, this peer's number, how many there are; None for a peer that is alone."""
    if "BENCH_TURNS" not in os.environ:
        return None
    folder, index, count = os.environ["BENCH_TURNS"].rsplit(":", 2)
    return Turns(Path(folder), int(index), int(count))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def peak_mib() -> float:
    """VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def serve(run: Callable[[Job], list[Step]]) -> None:
    """Run the job whose file is the first argument, and leave steps and peak memory beside it as rank-R.json."""
    job = Path(sys.argv[1])
    steps = run(Job(**json.loads(job.read_text())))
    if among := turns():
        among.wait(math.inf)
    left = {"steps": [asdict(step) for step in steps], "peak_mib": peak_mib()}
    (job.parent / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(left))
