"""Check A4: every strategy on one rank over the device's own collectives, what moves memory, compiled blocks, and a
run as it is typed whose steps are profiled.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cells import Measured
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.runs import tiny_words, written_rows
from benchmarks.gpu.scene import Scene, measured, relative

EQUAL = 1e-5
"""Relative: one rank adds nothing up, only DeepSpeed's own clipping rounds otherwise."""
BF16 = 3e-2
CASES: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "fsdp": (),
    "fsdp offload": ("strategy.offload=parameters",),
    "hsdp": ("strategy.shard_size=1",),
    "zero1": (),
    "zero2": (),
    "zero3": (),
    "zero3 offload": ("strategy.offload=parameters",),
    "single offload_activations": ("train.offload_activations=true",),
    "single checkpointing none": ("train.gradient_checkpointing=none",),
    "single in_backward": ("optim.in_backward=true", "train.max_grad_norm=inf"),
    "single paged_adamw8bit": ("optim.name=paged_adamw8bit",),
    "single compiled": ("train.compile=true",),
    "fsdp compiled": ("train.compile=true",),
}
"""Strategy and a word that tells cases apart -> overrides."""
ON_CPU = ("fsdp", "hsdp", "zero2", "zero3", "single offload_activations", "single checkpointing none")
"""Cases of the rehearsal; the equality matrix has the others there."""
LOOSE = {"single paged_adamw8bit": 2e-2, "single in_backward": 1e-3, "single compiled": 1e-4, "fsdp compiled": 1e-4}
"""Moments of 8 bits; no clipping; a program adds in another order."""


def strategies(scene: Scene, facts: Facts) -> None:
    """Losses of each case against the single process's."""
    rows = written_rows(scene)
    alone = {
        method: measured(scene, tiny_words(rows, method, precision=precision), 4)
        for method, precision in (("lora", "fp32"), ("qlora", "bf16"), ("full", "bf16"))
    }
    for strategy in ("fsdp", "zero3"):  # bf16 casts what fp32 leaves
        for method in ("qlora", "full"):
            with facts.part(f"{method} bf16 {strategy}"):
                found = measured(scene, tiny_words(rows, method, strategy=strategy, precision="bf16"), 4)
                _held(f"{method} bf16 {strategy}", found, alone[method], BF16, facts)
    with facts.part("a profiled run as it is typed"):
        _typed(scene, rows, facts)
    for name, extra in _cases(scene):
        with facts.part(f"lora {name}"):
            words = tiny_words(rows, "lora", *_unsaid(extra), strategy=name.split()[0])
            _held(f"lora {name}", measured(scene, _said(words, extra), 4), alone["lora"], LOOSE.get(name, EQUAL), facts)


def _cases(scene: Scene) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from ((name, extra) for name, extra in CASES.items() if scene.cuda or name in ON_CPU)


def _unsaid(extra: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in extra if word.startswith("strategy."))


def _said(words: tuple[str, ...], extra: tuple[str, ...]) -> tuple[str, ...]:
    """The words with what extra says in place of theirs: Hydra takes no key twice."""
    keys = {word.partition("=")[0] for word in extra if not word.startswith("strategy.")}
    own = [word for word in extra if word.partition("=")[0] in keys]
    return (*(word for word in words if word.partition("=")[0] not in keys), *own)


def _held(what: str, found: Measured, alone: Measured, most: float, facts: Facts) -> None:
    facts.near(f"{what}: losses", relative(found.losses, alone.losses), most)


def _typed(scene: Scene, rows: Path, facts: Facts) -> None:
    """From the command to the verified result."""
    run = scene.folder / "typed"
    words = [
        "model=tiny", "method=qlora", "data=local", f"data.path={rows}", "train.steps=6", "train.profile=2",
        "train.global_batch_size=4", "checkpoint.every=3", "tracker=[]", "launcher=local", "launcher.devices=1",
        "strategy=fsdp", f"train.precision={'bf16' if scene.cuda else 'fp32'}", f"run_dir={run}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "dsft.run", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=scene.left_s)
    said = "" if done.returncode == 0 else ": " + " ".join(done.stderr.split())[-300:]
    facts.note("profiled run: exit code", done.returncode, ok=done.returncode == 0, why=f"must be 0{said}")
    if done.returncode == 0:
        state = json.loads((run / "status.json").read_text())["state"]
        facts.note("profiled run: state", state, ok=state == "done")
        tables = sorted((run / "profile").glob("*.md"))
        facts.note("profiled run: tables", len(tables), ok=len(tables) > 0)
        proven = (run / "adapter" / "adapter_model.safetensors").is_file()
        facts.note("profiled run: verified result", proven, ok=proven)
