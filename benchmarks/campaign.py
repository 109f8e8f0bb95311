"""The campaign of faults: runs through faults at random moments must end bit-equal to runs that had none.

A configuration is one run: its faults are drawn beforehand from the seed, and each is noted once it is over, so that a
campaign which ends early goes on where it was.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.damages import CHANGES, MANIFEST
from benchmarks.fault_starts import command, prepare
from benchmarks.kills import starts, steps_recorded
from benchmarks.plants import Plant, environment, happened
from benchmarks.run_folders import differences, events, words

STEPS = 240
LIMIT_S = 300.0
"""After so long an attempt hangs. A stopped rank is given up after some seconds more than train.hang_after."""

CASES: dict[str, tuple[int, list[str]]] = {
    "lora ddp x2": (2, ["method=lora", "strategy=ddp"]),
    "lora ddp x4": (4, ["method=lora", "strategy=ddp"]),
    "qlora fsdp x2": (2, ["method=qlora", "strategy=fsdp"]),
    "full zero3 x2": (2, ["method=full", "strategy=zero3"]),
    "lora single x1": (1, ["method=lora", "strategy=single"]),
    "lora hsdp 2x2": (4, ["method=lora", "strategy=hsdp", "strategy.shard_size=2"]),
    "dora zero2 x2": (2, ["method=dora", "strategy=zero2"]),
    "full fsdp x2, gpt2": (2, ["method=full", "strategy=fsdp", "model.config.model_type=gpt2"]),
}

KINDS = {"kill -9": 9, "SIGSTOP": 4, "an error": 4, "a full disk": 3, "kill -9, then damage": 5}
"""Kind -> how often it is drawn of so many."""

STEP, SAVE = "dsft.engine.step:train_step", "dsft.checkpoint.files:_Writer.write_data"
PHASES = {
    "step": [STEP], "save": [SAVE], "evaluation": ["dsft.engine.evaluate:_measured", "dsft.engine.evaluate:_generate"],
    "loading": ["dsft.engine.assemble:assemble", "dsft.checkpoint.restore:restore"],
    "result": ["dsft.engine.result:write_result", "os:rename"],
}  # fmt: skip
DRAWN = {"step": 8, "save": 7, "evaluation": 4, "loading": 3, "result": 3}


@dataclass(frozen=True)
class Fault:
    """One that was drawn. plants: of the attempt that it happens in, and what ends that attempt if the fault does not;
    change: of the file no. `file` of the newest checkpoint, made before the next attempt.
    """

    kind: str
    phase: str
    rank: int
    plants: tuple[Plant, ...]
    change: str = ""
    file: int = 0


@dataclass
class Over:
    """What became of a fault. after_s: seconds from it to the next step on record, 0 where the attempt went on, None
    where no step was left.
    """

    kind: str
    phase: str
    rank: int
    happened: bool
    code: int | None
    after_s: float | None
    wrong: list[str] = field(default_factory=list)


def drawn(size: int, count: int, dice: random.Random) -> list[Fault]:
    """So many faults in the order in which they come; those of the result last, as it is made once all steps are."""
    found = [_one(size, dice) for _ in range(count)]
    return sorted(found, key=lambda fault: fault.phase == "result")


def _one(size: int, dice: random.Random) -> Fault:
    kinds = [kind for kind in KINDS if size > 1 or kind != "SIGSTOP"]  # nobody is there to miss a rank that is alone
    kind = dice.choices(kinds, [KINDS[kind] for kind in kinds])[0]
    phases = {"a full disk": ["save"], "kill -9, then damage": ["step", "save"]}.get(kind, list(DRAWN))
    phase = dice.choices(phases, [DRAWN[phase] for phase in phases])[0]
    rank, place = dice.randrange(size), dice.choice(PHASES[phase])
    nth = dice.randint(3, 9) if phase == "step" else dice.randint(2, 3) if phase == "save" else 1
    after = dice.uniform(0, 0.05)
    when = "args and '/adapter' in str(args[0])" if place == "os:rename" else ""
    rank = 0 if place == "os:rename" else rank
    what, value = {
        "SIGSTOP": ("stop", ""), "an error": ("raise", "ValueError('planted')"),
        "a full disk": ("raise", "OSError(28, 'No space left on device')"),
    }.get(kind, ("kill", ""))  # fmt: skip
    late = after if what in ("kill", "stop") and phase in ("step", "save") else 0.0
    plants = [Plant(place, what, value, nth=nth, rank=rank, when=when, after=late)]
    if phase != "result":
        plants.append(Plant(STEP, "kill", nth=14, rank=dice.randrange(size)))
    change = dice.choice(sorted(CHANGES)) if kind == "kill -9, then damage" else ""
    return Fault(kind, phase, rank, tuple(plants), change, dice.randrange(12))


def overrides(name: str, folder: Path) -> list[str]:
    """What is typed for a configuration."""
    size, case = CASES[name]
    more = [
        "optim.schedule=constant", f"data.eval_path={folder / 'eval.jsonl'}", "data.verify=exact", "train.eval_every=9",
        "train.hang_after=5", "checkpoint.keep=3",
    ]  # fmt: skip
    return [*words(folder / "rows.jsonl", case, size, background=True, steps=STEPS), *more]


@dataclass
class Campaign:
    """One configuration on its way through its faults. place: its folder: run, reference and journal."""

    name: str
    place: Path
    typed: Sequence[str]
    faults: Sequence[Fault]
    over: list[Over] = field(default_factory=list)
    code: str = ""
    fault_at: float | None = None

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.place / "run"

    def suffer(self) -> list[str]:
        """Make the faults that are left, let the run end, and compare; what differs."""
        reference = self.place / "reference"
        if not (reference / "adapter").is_dir():
            shutil.rmtree(reference, ignore_errors=True)
            subprocess.run([*command(self.typed), f"run_dir={reference}"], check=True, stdout=subprocess.DEVNULL)
        for fault in self.faults[len(self.over) :]:
            self.over.append(self._attempt(fault))
            self._note()
            what = f"{fault.kind} of rank {fault.rank} in {fault.phase}"
            print(f"{self.name}: {len(self.over)} of {len(self.faults)}, {what}: {self.over[-1].code}", flush=True)
        last = self._attempt(Fault("none", "", 0, ()))
        wrong = [] if last.code == 0 else [f"ended with {last.code}"]
        self._note()
        return [*wrong, *[what for over in self.over for what in over.wrong], *differences(reference, self.run)]

    def recall(self, code: str) -> None:
        """Go on with what the journal says of this code; without any, begin anew."""
        journal = self.place / "over.jsonl"
        lines = journal.read_text().splitlines() if journal.is_file() else []
        known = [json.loads(line) for line in lines]
        if not known or known[0] != {"code": code, "faults": len(self.faults)}:
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir(parents=True)
            journal.write_text(json.dumps({"code": code, "faults": len(self.faults)}) + "\n")
            known = []
        self.code, self.over = code, [Over(**line) for line in known[1:]]

    def _note(self) -> None:
        lines = [{"code": self.code, "faults": len(self.faults)}, *map(asdict, self.over)]
        fresh = self.place / "over.tmp"
        fresh.write_text("".join(json.dumps(line) + "\n" for line in lines))
        fresh.rename(self.place / "over.jsonl")

    def _attempt(self, fault: Fault) -> Over:
        """Start the run; the fault happens; it ends. The damage of the fault before has been made by then."""
        fired, begun, failed = self.place / "fired", time.time(), len(events(self.run, "save_failed"))
        fired.unlink(missing_ok=True)
        with (self.place / "said").open("w") as said:
            process = subprocess.Popen(
                [*command(self.typed), f"run_dir={self.run}"], env={**os.environ, **environment(fault.plants, fired)},
                stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        stepped, wrong = _next_step(process, self.run, begun + LIMIT_S), []
        if stepped and self.fault_at and self.over[-1].after_s is None:
            self.over[-1].after_s = round(stepped - self.fault_at, 1)
        try:
            process.wait(timeout=max(1.0, begun + LIMIT_S - time.time()))
        except subprocess.TimeoutExpired:
            wrong.append(f"an attempt with {fault.kind} in {fault.phase} was still there after {LIMIT_S:g} s")
            process.send_signal(signal.SIGKILL)
            process.wait()
        mine = [line for line in happened(fired) if line["place"] == fault.plants[0].place] if fault.plants else []
        self.fault_at = mine[0]["time"] if mine else None
        over = Over(fault.kind, fault.phase, fault.rank, bool(mine), process.returncode, None, wrong)
        if mine and fault.kind == "a full disk":
            over.after_s = 0.0
            if len(events(self.run, "save_failed")) == failed:
                wrong.append("a save on a full disk was not said to have failed")
        if mine and fault.change:
            damage_newest(self.run, fault.change, fault.file)
        return over


def damage_newest(run: Path, change: str, file: int) -> bool:
    """Damage a file of the newest checkpoint, if there is another one to go on from."""
    there = sorted((run / "checkpoints").glob("step-????????"))
    if len(there) < 2:
        return False
    names = sorted(path.name for path in there[-1].iterdir() if path.is_file())
    chosen = names[file % len(names)]
    if change == "an older file" and chosen == MANIFEST:
        return False
    if change == "an older file":
        shutil.copy(there[-2] / chosen, there[-1] / chosen)
    else:
        CHANGES[change](there[-1] / chosen)
    return True


def _next_step(process: "subprocess.Popen[bytes]", run: Path, until: float) -> float | None:
    """When the first step of this attempt was on record; None if it made none."""
    attempt, seen = starts(run), None
    while process.poll() is None and time.time() < until:
        time.sleep(0.02)
        if starts(run) == attempt:
            continue
        count = steps_recorded(run)
        seen = count if seen is None else seen
        if count > seen:
            return time.time()
    return None


def campaign(
    faults: int, seed: int, folder: Path, code: str, names: Sequence[str]
) -> dict[str, tuple[Campaign, list[str]]]:
    """So many faults over the configurations; name -> what happened, and what is not bit-equal at the end."""
    prepare(folder)
    found = {}
    for index, name in enumerate(names):
        count = faults // len(names) + (index < faults % len(names))
        dice = random.Random(f"{seed} {name}")
        place = folder / name.replace(" ", "-").replace(",", "")
        one = Campaign(name, place, overrides(name, folder), drawn(CASES[name][0], count, dice))
        one.recall(code)
        found[name] = (one, one.suffer())
        print(f"{name}: {len(one.over)} faults, different: {'; '.join(found[name][1][:3]) or 'nothing'}", flush=True)
    return found
