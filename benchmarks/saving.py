"""What a checkpoint costs: bytes, time, and how long the training waits for it; SmolLM2-135M, LoRA r=16 on all linears.

python -m benchmarks.saving [--rounds 5]   writes benchmarks/results/saving.md
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import here
from dsft.checkpoint.lease import acquire
from dsft.checkpoint.manifest import Identity
from dsft.checkpoint.restore import Search, restore
from dsft.checkpoint.saver import Outcome, Retention, Saver
from dsft.checkpoint.store import Store
from dsft.comm.world import World
from dsft.compose import compose
from dsft.data.open import open_data
from dsft.engine.assemble import Session, assemble
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step

WORDS = [
    "model=smollm2_135m", "method=lora", "data=reasoning_gym", "data.size=256", "data.eval_size=0", "launcher=local",
    "train.global_batch_size=16", "train.steps=20", "tracker=[]",
]  # fmt: skip
WHO, PROGRESS = Identity("bench", "config", "base", "data"), {"optimizer": "adamw"}


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/saving.md"))
    args = parser.parse_args()
    composed = compose(WORDS)
    world = World(0, 1, 0, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    files = composed.run.model.resolve()
    data = open_data(composed.run.data, files.tokenizer(), max_length=512, seed=0)
    session = assemble(composed.run, files, world)
    took: dict[str, list[float]] = {name: [] for name in ("step", "beside", "plain", "stall", "load", "write", "read")}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        nbytes = _rounds(session, data, Path(folder), args.rounds, took)
    state = sum(tensor.numel() * tensor.element_size() for tensor in composed.run.strategy.export_state().values())
    middle = {name: statistics.median(values) for name, values in took.items()}
    args.out.write_text(_text(middle, nbytes, state, args.rounds, composed.run.train.precision))
    print(args.out.read_text())
    return 0


def _rounds(session: Session, data: Any, folder: Path, rounds: int, took: dict[str, list[float]]) -> int:
    store, strategy = Store(folder), session.run.strategy
    lease, _ = acquire(store.folder)
    saver = Saver(store, lease, WHO, session.world, Retention(1, 0))
    nbytes = 0
    for turn in range(rounds + 1):  # the first one warms up
        seconds: dict[str, float] = {}
        batches = step_batches(session, data, turn + 1)[1]
        begun = time.perf_counter()
        train_step(session, batches, 2 * turn + 1, 1.0)
        seconds["step"] = time.perf_counter() - begun
        begun = time.perf_counter()
        saver.start(2 * turn + 1, strategy.export_state, PROGRESS, background=True)
        train_step(session, batches, 2 * turn + 1, 1.0, settle=saver.settle)
        seconds["beside"] = time.perf_counter() - begun
        outcome = _good(saver.take())
        seconds["stall"], nbytes = outcome.stall_s, outcome.nbytes
        begun = time.perf_counter()
        saver.start(2 * turn + 2, strategy.export_state, PROGRESS, background=False)
        _good(saver.take())
        seconds["plain"] = time.perf_counter() - begun
        begun = time.perf_counter()
        assert restore(strategy, Search(store, lease, WHO, "adamw", session.world, lambda *_: None)) is not None
        seconds["load"] = time.perf_counter() - begun
        seconds |= _dd(folder / "plain", nbytes)
        for name, value in seconds.items():
            if turn:
                took[name].append(value)
    return nbytes


def _good(outcome: Outcome | None) -> Outcome:
    assert outcome is not None
    assert outcome.error is None, outcome.error
    return outcome


def _dd(path: Path, nbytes: int) -> dict[str, float]:
    """Seconds that dd takes to write as many bytes to the same disk (with fsync), and to read them."""
    blocks = -(-nbytes // 2**20)
    begun = time.perf_counter()
    write = ["dd", "if=/dev/zero", f"of={path}", "bs=1M", f"count={blocks}", "conv=fsync", "status=none"]
    subprocess.run(write, check=True)
    between = time.perf_counter()
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"], check=True)
    seconds = {"write": between - begun, "read": time.perf_counter() - between}
    path.unlink()
    return seconds


def _text(middle: dict[str, float], nbytes: int, state: int, rounds: int, precision: str) -> str:
    lines = [
        "# What a checkpoint costs",
        "",
        f"SmolLM2-135M, LoRA r=16 on all linears, AdamW, {precision}, one process, 16 examples a step; medians of "
        f"{rounds} rounds.",
        f"`python -m benchmarks.saving` on {here()}.",
        "",
        "| | | bound |",
        "|---|---|---|",
        f"| bytes of a save / (parameters + moments) | {nbytes / state:.3f} ({nbytes / 1e6:.1f} MB) | 1.05 |",
        f"| stall of a background save / a step | {middle['stall'] / middle['step']:.3f} | 0.02 |",
        f"| stall of a background save / a plain save | {middle['stall'] / middle['plain']:.3f} | 0.05 |",
        f"| a step with a background save beside it / a step | {middle['beside'] / middle['step']:.3f} | |",
        f"| plain save / dd with fsync of as many bytes | {middle['plain'] / middle['write']:.2f} | |",
        f"| verify and load / dd reading as many bytes | {middle['load'] / middle['read']:.2f} | |",
        "",
        f"Seconds: step {middle['step']:.3f}, stall {middle['stall']:.4f}, plain save {middle['plain']:.3f}, load "
        f"{middle['load']:.3f}, dd {middle['write']:.3f} and {middle['read']:.3f}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
