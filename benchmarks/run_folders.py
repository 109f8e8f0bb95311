"""Run folders that faults are tried on: what is trained there, what they hold, and how two of them differ."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEPS = 120


def words(data: Path, case: Sequence[str], size: int, *, background: bool, steps: int = STEPS) -> list[str]:
    """Overrides of one case."""
    return [
        "model=tiny", "data=local", f"data.path={data}", "train.precision=fp32", f"train.steps={steps}",
        "train.global_batch_size=4", "train.max_length=512", "train.log_samples=true", "optim.lr=1e-3", "tracker=[]",
        "launcher=local", f"launcher.devices={size}", "checkpoint.every=3", f"checkpoint.background={background}",
        "checkpoint.verify_result=false", "train.compile=false", *case,
    ]  # fmt: skip


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

    from dsft.checkpoint import manifest, reading

    folder = max((run_dir / "checkpoints").glob("step-????????"))
    content = manifest.read(folder)
    index = reading.index_of(folder, content)
    state = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in reading.shapes(index).items()}
    reading.Reading(state, index).fill(folder, content)
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
