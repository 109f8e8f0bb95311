"""The fault campaign: a run that is killed at random moments must end bit-equal to one that never was.

python -m benchmarks.faults [--kills 20] [--seed 0]   writes benchmarks/results/faults.md
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cells import write_rows
from benchmarks.machine import here

STEPS = 120
RESUME = "import sys; from pathlib import Path; from dsft_launchers.local import launch; run = Path(sys.argv[1]); \
sys.exit(launch([sys.executable, '-m', 'dsft.job', str(run)], num_processes=int(sys.argv[2]), \
log_dir=run / 'logs', env={}))"
"""What dsft.run does once it has checked the run: spares a resume the checks' imports."""

CASES = {
    "lora ddp x2": (2, ["method=lora", "strategy=ddp"]),
    "lora ddp x4": (4, ["method=lora", "strategy=ddp"]),
    "qlora fsdp x2": (2, ["method=qlora", "strategy=fsdp"]),
    "full zero3 x2": (2, ["method=full", "strategy=zero3"]),
}


@dataclass
class Verdict:
    """kills: (phase, rank, step); different: what is not bit-equal to the reference, empty if all is."""

    kills: list[tuple[str, int, int]] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    resumed_from: list[int] = field(default_factory=list)


def words(data: Path, case: Sequence[str], size: int, *, background: bool, steps: int = STEPS) -> list[str]:
    """Overrides of one case."""
    return [
        "model=tiny", "data=local", f"data.path={data}", "train.precision=fp32", f"train.steps={steps}",
        "train.global_batch_size=4", "train.max_length=512", "train.log_samples=true", "optim.lr=1e-3", "tracker=[]",
        "launcher=local", f"launcher.devices={size}", "checkpoint.every=3", f"checkpoint.background={background}",
        "checkpoint.verify_result=false", "train.compile=false", *case,
    ]  # fmt: skip


def survive(
    reference: Path, run_dir: Path, command: Sequence[str], size: int, kills: int, dice: random.Random
) -> Verdict:
    """Start the run, kill a random rank, start it again, and so on; then let it end and compare with reference."""
    verdict = Verdict()
    start = [sys.executable, "-m", "dsft.run", *command, f"run_dir={run_dir}"]
    for _ in range(kills):
        with _started(start) as run:
            phase, rank = dice.choice(("step", "save")), dice.randrange(size)
            step = _moment(run, run_dir, phase, dice)
            if step is None:
                break  # it was done before the moment came
            os.kill(_ranks(run_dir)[rank], signal.SIGKILL)
            verdict.kills.append((phase, rank, step))
            run.wait(timeout=60)
        start = [sys.executable, "-c", RESUME, str(run_dir), str(size)]
    done = subprocess.run(start, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        verdict.different.append(f"ended with {done.returncode}: {done.stderr[-2000:]}")
    verdict.resumed_from = [event["step"] for event in events(run_dir, "resume")]
    verdict.different += differences(reference, run_dir)
    return verdict


def differences(reference: Path, run_dir: Path) -> list[str]:
    """What in a finished run is not bit-equal to the reference: result, optimizer state, samples, steps."""
    found = []
    results = sorted(path.name for path in (reference / "adapter").glob("*.safetensors"))
    found += [name for name in results if not _same(reference / "adapter" / name, run_dir / "adapter" / name)]
    if not _same(reference / "samples.jsonl", run_dir / "samples.jsonl"):
        found.append("samples.jsonl")
    ours, theirs = saved_state(run_dir), saved_state(reference)
    if ours.keys() != theirs.keys():
        found.append("the names in the checkpoint")
    found += [name for name in theirs if name in ours and not ours[name].equal(theirs[name])]
    losses = [
        [(line["step"], line["loss"]) for line in lines(run / "metrics.jsonl") if "loss" in line]
        for run in (reference, run_dir)
    ]
    return found if losses[0] == losses[1] else [*found, "metrics.jsonl"]


def saved_state(run_dir: Path) -> dict[str, Any]:
    """All tensors of the newest checkpoint, whole, in this process."""
    import torch

    from dsft.checkpoint import files

    folder = max((run_dir / "checkpoints").glob("step-????????"))
    state = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in files.shapes(files.index(folder)).items()}
    files.read(state, folder, None)
    return state


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """What a run's record has of this event; nothing where the run has not begun."""
    path = run_dir / "events.jsonl"
    return [line for line in lines(path) if line["event"] == name] if path.is_file() else []


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _moment(run: "subprocess.Popen[bytes]", run_dir: Path, phase: str, dice: random.Random) -> int | None:
    """Wait for a random moment of this attempt, in a step or while a save is written; the step, None if it ended."""
    begun = _starts(run_dir)
    after, wait = dice.randint(4, 9), dice.uniform(0, 0.06)
    seen: list[int] = []
    while run.poll() is None:
        if _starts(run_dir) > begun or begun == 0:
            seen.append(_steps(run_dir))
        unfinished = any((run_dir / "checkpoints").glob("step-*.tmp-*"))
        if seen and seen[-1] >= seen[0] + after and (phase == "step" or unfinished):
            time.sleep(wait)
            return seen[-1] if run.poll() is None else None
        time.sleep(0.002)
    return None


def _starts(run_dir: Path) -> int:
    path = run_dir / "events.jsonl"
    return path.read_text().count('"event": "assembled"') if path.is_file() else 0


def _steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.is_file() else 0


def _ranks(run_dir: Path) -> list[int]:
    return [rank["pid"] for rank in events(run_dir, "start")[-1]["ranks"]]


@contextmanager
def _started(command: Sequence[str]) -> "Iterator[subprocess.Popen[bytes]]":
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield run
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait(timeout=120)


def main() -> int:
    """Run all cases, plain and background saves; 1 if one of them is not bit-equal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/faults.md"))
    args = parser.parse_args()
    begun, dice = time.monotonic(), random.Random(args.seed)
    rows = [
        "| case | saves | kills in a step | kills in a save | resumed from | different |",
        "|---|---|---|---|---|---|",
    ]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, 60)
        for name, (size, case) in CASES.items():
            reference = Path(folder) / f"{name} reference".replace(" ", "-")
            plain = words(data, case, size, background=False)
            subprocess.run([sys.executable, "-m", "dsft.run", *plain, f"run_dir={reference}"], check=True)
            for background in (False, True):
                run_dir = Path(folder) / f"{name} {background}".replace(" ", "-")
                command = words(data, case, size, background=background)
                verdict = survive(reference, run_dir, command, size, args.kills // 2, dice)
                phases = [phase for phase, _, _ in verdict.kills]
                rows.append(
                    f"| {name} | {'background' if background else 'plain'} | {phases.count('step')} | "
                    f"{phases.count('save')} | {', '.join(map(str, verdict.resumed_from))} | "
                    f"{'; '.join(verdict.different[:3]) or 'nothing'} |"
                )
                print(rows[-1], flush=True)
                failed |= bool(verdict.different) or not verdict.kills
    head = [
        "# The fault campaign: kill -9 of a random rank at random moments",
        "",
        f"Tiny model, fp32, {STEPS} steps, a save every 3; each run is killed, resumed, killed again, then ends.",
        "Compared bit by bit with a run that was never interrupted: result, optimizer state, samples.jsonl, losses.",
        f"`python -m benchmarks.faults --kills {args.kills} --seed {args.seed}`, {(time.monotonic() - begun) / 60:.0f} "
        f"minutes on {here()}.",
        "",
    ]
    args.out.write_text("\n".join([*head, *rows]) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
