"""What every peer of a speed benchmark shares: what it is asked for, the clock of its steps, what it leaves behind.

The standard library alone: a peer in another environment imports it too.
"""

import json
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


class Clock:
    """Collects steps; one begins where the last ended."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.begin()

    def begin(self) -> None:
        """The next step begins now."""
        self.wall, self.cpu = time.perf_counter(), _cpu()

    def end(self, tokens: int, supervised: int, positions: int, loss: float) -> None:
        """A step is over."""
        seconds, cpu = time.perf_counter() - self.wall, _cpu() - self.cpu
        self.steps.append(Step(tokens, supervised, positions, seconds, cpu, loss))
        self.begin()


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
    left = {"steps": [asdict(step) for step in steps], "peak_mib": peak_mib()}
    (job.parent / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(left))
