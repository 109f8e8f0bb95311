"""What each memory option gives and costs: peak and tokens per second of a fresh process, beside the plan's estimate.

python -m benchmarks.memory [--steps 3]   writes benchmarks/results/memory.md. SmolLM2-135M, 8 rows of GSM8K cut to 250
tokens a step, so that a step is one micro-batch of 2,048 tokens; all are supervised; the first step is not timed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.job import peak_mib
from benchmarks.machine import here
from benchmarks.measure import ALIKE, GSM8K

RESULT = Path("benchmarks/results/memory.md")
BATCH, TOKENS = 8, 250
FIRST = "train.micro_batch_tokens=2048"
FORWARD = (
    FIRST,
    "train.micro_batch_tokens=1024",
    "train.micro_batch_tokens=512",
    "train.gradient_checkpointing=selective",
    "train.gradient_checkpointing=full",
)
OPTIONS = {
    "full": (
        *FORWARD,
        "optim.name=paged_adamw8bit",
        "optim.in_backward=true",
        "train.gradient_checkpointing=full optim.in_backward=true",
    ),
    "lora": FORWARD,  # what learns is too little for the optimizer's options to show
    "qlora": (FIRST,),
}


def words(method: str, option: str, rows: Path) -> list[str]:
    """Overrides of one cell; the first option is how the others run too."""
    return [
        "model=smollm2_135m", f"method={method}", "data=local", f"data.path={rows}", f"train.global_batch_size={BATCH}",
        "train.max_length=256", "train.max_grad_norm=inf", "launcher=local", "tracker=[]", FIRST,
        *option.split(),
    ]  # fmt: skip


def write_rows(path: Path, steps: int) -> None:
    """Texts of TOKENS tokens, made of questions and answers."""
    from dsft.compose import compose

    tokenizer = compose(["model=smollm2_135m"]).run.model.resolve().tokenizer()
    texts = [json.loads(line) for line in GSM8K.read_text().splitlines()[: 4 * BATCH * steps]]
    tokens = tokenizer(" ".join(f"{row['question']} {row['answer']}" for row in texts))["input_ids"]
    with path.open("w") as out:
        for start in range(0, BATCH * steps * TOKENS, TOKENS):
            out.write(json.dumps({"text": tokenizer.decode(tokens[start : start + TOKENS])}) + "\n")


def child(overrides: list[str], steps: int) -> int:
    """Estimate, then train, in this process; prints what came of both."""
    import torch

    from benchmarks.peer_dsft import train
    from dsft.comm.world import World
    from dsft.compose import compose
    from dsft.plan import make_plan

    composed = compose(overrides)
    memory = make_plan(composed, composed.run.model.resolve())["memory"]
    done = train(composed.run, World(0, 1, 0, torch.device("cpu")), steps)
    speed = sum(step.tokens for step in done[1:]) / sum(step.seconds for step in done[1:])
    print(json.dumps({"tok_s": speed, "loss": done[-1].loss, "peak_mib": peak_mib(), "memory": memory}))
    return 0


def measure(overrides: list[str], steps: int) -> dict[str, Any]:
    """One cell, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--steps", str(steps), "--child", json.dumps(overrides)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{overrides}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(method: str, option: str, found: dict[str, Any], base: dict[str, Any]) -> str:
    estimate, peak = found["memory"]["total"] / 2**20, found["peak_mib"]
    return (
        f"| {method} | {option} | {peak:,.0f} | {peak / base['peak_mib']:.2f} | {estimate:,.0f} | "
        f"{estimate / peak:.2f} | {found['tok_s']:.0f} | {found['loss']:.4f} |"
    )


def _text(lines: list[str], steps: int, precision: str) -> Iterator[str]:
    yield "# What each memory option gives and costs"
    yield ""
    yield (
        f"SmolLM2-135M, {BATCH} rows of {TOKENS} tokens a step, all supervised, {precision}, one process; "
        f"{steps - 1} timed steps, one run of each. Peak: VmHWM of the whole process, some 500 MiB of it libraries; "
        "estimate: the plan's."
    )
    yield f"`python -m benchmarks.memory --steps {steps}` on {here()}."
    yield ""
    yield "| method | option | peak MiB | x first | estimate MiB | x peak | tokens/s | last loss |"
    yield "|---|---|---|---|---|---|---|---|"
    yield from lines
    yield ""
    yield (
        "Each option is set alone, on train.micro_batch_tokens=2048 and train.max_grad_norm=inf. On a CPU "
        "train.offload_activations and strategy.offload do nothing (there is no other memory to go to) and are not "
        "measured."
    )


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--methods", default=",".join(OPTIONS))
    parser.add_argument("--child")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child), args.steps)
    if not GSM8K.is_file():
        print(f"benchmarks.memory: {GSM8K} is not there", file=sys.stderr)
        return 2
    from dsft.compose import compose

    os.environ |= ALIKE
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, args.steps)
        for method in args.methods.split(","):
            base: dict[str, Any] = {}
            for option in OPTIONS[method]:
                found = measure(words(method, option, rows), args.steps)
                base = base or found
                lines.append(_row(method, option, found, base))
                print(lines[-1], flush=True)
    args.out.write_text("\n".join(_text(lines, args.steps, compose(["model=tiny"]).run.train.precision)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
