"""Runs cells of a matrix in warm groups of processes: one that crashes costs its own cell and a new group.

What a cell gave is a line of the journal as soon as it is there, so that a run that ends early can be gone on with.
"""

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dsft_launchers.codes import STOPPED
from dsft_launchers.local import launch
from dsft_launchers.verdict import CONSEQUENCE

HUNG_S = 300.0
"""After so long a cell hangs. The slowest takes some seconds, and a first use of DeepSpeed compiles nothing."""

MOST = 64
"""Cells of a group before a new one takes over: each mesh leaves process groups whose threads wake a hundred times a
second, after 200 cells on four ranks most of the load. They cannot be left sooner: DTensor's caches hold them by name.
"""

COSTS = {1: 0.7, 2: 1.0, 3: 1.6, 4: 2.2}
"""Time of a cell by number of processes, on two cores that are busy with them: for the estimate of the time left."""


@dataclass(frozen=True)
class Spec:
    """One cell. words: what is composed, without its rate; rates: of optim.lr, the first that moves the loss is taken;
    fault: planted in it, if any; steps: optimizer steps of one without a fault.
    """

    words: tuple[str, ...]
    rates: tuple[float, ...]
    fault: str | None = None
    steps: int = 10


@dataclass(frozen=True)
class Journal:
    """Results as lines, each with the code that it was measured on. A line that was torn by a kill is none."""

    path: Path
    code: str

    def read(self) -> dict[str, Any]:
        """Name of a cell -> what it gave on this code."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        return {line["name"]: line["cell"] for line in map(_parsed, lines) if line.get("code") == self.code}

    def forget(self, rows: Sequence[str], *, keep: bool) -> None:
        """Leave out what other code gave, and of these rows everything, or with keep what crashed."""
        stays = {
            name: cell for name, cell in self.read().items()
            if name.partition("|")[2] not in rows or (keep and "crashed" not in cell)
        }  # fmt: skip
        self.path.write_text("")
        for name, cell in stays.items():
            self.write(name, cell)

    def write(self, name: str, cell: Mapping[str, Any]) -> None:
        """Append one, in one write."""
        with self.path.open("a") as out:
            out.write("\n" + json.dumps({"code": self.code, "name": name, "cell": cell}) + "\n")


def _parsed(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Crew:
    """Who runs cells: so many ranks of one group. fake: one process plays the first of them, its numbers are not
    theirs; alone: each process is a world of its own, and they share the cells out; counted: collectives are counted;
    program: the module that each process runs; hung: seconds after which a cell hangs.
    """

    ranks: int
    fake: bool = False
    alone: bool = False
    counted: bool = False
    program: str = "benchmarks.cells"
    hung: float = HUNG_S

    @property
    def processes(self) -> int:
        """How many are started."""
        return 1 if self.fake else self.ranks


@dataclass(frozen=True)
class Job:
    """What a process of a group is given, as JSON: its crew, cells (name -> Spec), journal and code, a folder for what
    it says besides, seconds after which a cell hangs, and what is run later, in cells of this group.
    """

    ranks: int
    fake: bool
    alone: bool
    counted: bool
    program: str
    hung: float
    cells: dict[str, Any]
    journal: str
    code: str
    folder: str
    later: float


def run(crew: Crew, todo: Mapping[str, Any], journal: Journal, *, later: float = 0.0) -> dict[str, Any]:
    """Run the cells that the journal does not have yet; name -> measured, {"refused": why} or {"crashed": error}.

    todo: name -> a dataclass that the crew's program knows, a Spec for the equality matrix. later: what is to be run
    after this, in COSTS. Raises RuntimeError where a group cannot even begin, SystemExit with 75 where it was asked to
    stop.
    """
    while left := _left(todo, journal):
        batch = dict(islice(left.items(), MOST))
        after = later + (len(left) - len(batch)) * COSTS[1 if crew.alone else crew.ranks]
        with tempfile.TemporaryDirectory() as folder:
            code = _launch(crew, batch, journal, Path(folder), after)
            if code == STOPPED:
                raise SystemExit(STOPPED)
            if code != 0:
                _blame(Path(folder), batch, journal, code, crew.hung)
    found = journal.read()
    return {name: found[name] for name in todo}


def _left(todo: Mapping[str, Any], journal: Journal) -> dict[str, Any]:
    done = journal.read()
    return {name: spec for name, spec in todo.items() if name not in done}


def _launch(crew: Crew, todo: Mapping[str, Any], journal: Journal, folder: Path, later: float) -> int:
    unit = COSTS[1 if crew.alone else crew.ranks]
    job = Job(
        **vars(crew),
        cells={name: asdict(spec) for name, spec in todo.items()},
        journal=str(journal.path),
        code=journal.code,
        folder=str(folder),
        later=later / unit,
    )
    (folder / "job.json").write_text(json.dumps(vars(job)))
    command = [sys.executable, "-m", crew.program, str(folder / "job.json")]
    return launch(command, num_processes=crew.processes, log_dir=folder / "logs", env={"OMP_NUM_THREADS": "1"})


def _blame(folder: Path, todo: Mapping[str, Any], journal: Journal, code: int, hung_s: float) -> None:
    """Write down as crashed the cell that a group ended in, with the error of the rank that failed first.

    A rank that dies without a word (a signal, no memory, a hang) has only said which cell it began; a peer that lost
    it is not the cause.
    """
    logs = {path.stem: path.read_text(errors="replace") for path in sorted((folder / "logs").glob("rank-*.log"))}
    began = {path.stem: path.read_text() for path in sorted(folder.glob("rank-*.began"))}
    said = (json.loads(path.read_text()) for path in folder.glob("rank-*.error"))
    told = sorted((one for one in said if not CONSEQUENCE.search(one["line"])), key=lambda one: one["at"])
    done = journal.read()
    if told:
        journal.write(told[0]["name"], {"crashed": told[0]["line"]})
        return
    silent = {rank: name for rank, name in began.items() if name in todo and name not in done}
    if not silent:
        tails = "\n".join(text[-1500:] for text in logs.values())
        raise RuntimeError(f"the group of a matrix ended with {code} outside of any cell:\n{tails}")
    hung = {rank: name for rank, name in silent.items() if "Timeout (" in logs.get(rank, "")}
    for rank, name in (hung if hung and len(set(silent.values())) > 1 else silent).items():  # alone: others go on
        line = f"no end within {hung_s:g} s" if rank in hung else f"the group ended with {code}"
        journal.write(name, {"crashed": line})


@dataclass
class Progress:
    """What rank 0 prints, every ten seconds at most. later: cells of this group's cost that come after it."""

    total: int
    later: float
    began: float
    told: float = 0.0

    def tell(self, done: int, name: str) -> None:
        """One line: how many, which, and about how long it will take."""
        now = time.monotonic()
        if done < self.total and now - self.told < 10.0:
            return
        self.told = now
        left = (now - self.began) / done * (self.total - done + self.later)
        print(f"{done} of {self.total} cells, {name}; about {left / 60:.0f} minutes left", flush=True)
