"""How far bf16 takes the loss from fp32: this project and the plain loop, each beside itself in fp32.

python -m benchmarks.numerics [--layers 30] [--characters 1000] [--steps 10] [--seeds 3]
writes benchmarks/results/numerics.md. LoRA on SmolLM2-135M, 8 examples of GSM8K a step; a seed is another stretch of
the rows. A processor without products of bf16 makes them as benchmarks.rounded does.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.job import BATCH, Job
from benchmarks.machine import here
from benchmarks.measure import ALIKE, GSM8K, measure
from benchmarks.speed import PEERS
from dsft.repairs import computes_bf16

RESULT = Path("benchmarks/results/numerics.md")
NAMES = {"plain": "plain", "dsft-1024": "dsft-1024", "dsft-compiled": "dsft-1024"}
"""Loop -> the loop whose losses in fp32 are its reference."""
PRODUCTS = {
    True: "Products of bf16 are the hardware's own.",
    False: "Products of bf16 are summed in fp32 and rounded once, as hardware does (benchmarks/rounded.py).",
}


def write_model(folder: Path, layers: int) -> int:
    """SmolLM2-135M with the first layers of its blocks; returns how many it has."""
    from transformers import AutoModelForCausalLM

    from dsft.compose import compose

    files = compose(["model=smollm2_135m"]).run.model.resolve()
    model = AutoModelForCausalLM.from_pretrained(files.name_or_path)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(folder)
    files.tokenizer().save_pretrained(folder)
    return len(model.model.layers)


def losses(job: Job, name: str, precision: str) -> list[float]:
    """Of each step, in nats."""
    peer = PEERS[name]
    if not computes_bf16(0):
        peer = replace(peer, module=f"benchmarks.rounded {peer.module}")
    setting = Job(**{**vars(job), "precision": precision, "setting": peer.setting})
    found: list[float] = measure(peer, setting)["losses"]
    return found


def distances(job: Job) -> dict[str, float]:
    """Largest |loss in bf16 - its reference's in fp32| of each of NAMES."""
    exact = {name: losses(job, name, "fp32") for name in sorted(set(NAMES.values()))}
    return {
        name: max(abs(one - other) for one, other in zip(exact[reference], losses(job, name, "bf16"), strict=True))
        for name, reference in NAMES.items()
    }


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--characters", type=int, default=1000, help="of the longest row")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if not GSM8K.is_file():
        parser.error(f"{GSM8K} is not there")
    os.environ |= ALIKE
    lines = [
        line for line in GSM8K.read_text().splitlines() if len("".join(json.loads(line).values())) <= args.characters
    ]
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        model, rows = Path(folder) / "model", Path(folder) / "rows.jsonl"
        layers = write_model(model, args.layers)
        for seed in range(args.seeds):
            first = seed * args.steps * BATCH
            rows.write_text("\n".join(lines[first : first + args.steps * BATCH]) + "\n")
            job = Job("lora", str(model), str(rows), args.steps, "fp32", "single")
            for name, distance in distances(job).items():
                found[name].append(distance)
                print(f"seed {seed} {name}: {distance:.5f}", flush=True)
    worst = {name: max(values) for name, values in found.items()}
    heads = ["", *(f"seed {seed}" for seed in range(args.seeds)), "largest", "x plain"]
    table = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, values in found.items():
        cells = [PEERS[name].title, *(f"{value:.5f}" for value in (*values, worst[name]))]
        table.append(f"| {' | '.join(cells)} | {worst[name] / worst['plain']:.2f} |")
    args.out.write_text(
        "# How far bf16 takes the loss from fp32\n\n"
        f"Largest |loss in bf16 - loss in fp32| over {args.steps} steps of LoRA, each loop beside itself in fp32. "
        f"SmolLM2-135M, {layers} of its 30 blocks, {BATCH} examples of GSM8K a step, rows of at most {args.characters} "
        f"characters. {PRODUCTS[computes_bf16(0)]}\n"
        f"`{shlex.join(['python', '-m', 'benchmarks.numerics', *sys.argv[1:]])}` on {here()}.\n\n"
        + "\n".join(table)
        + "\n"
    )
    print(args.out.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
