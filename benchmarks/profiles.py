"""Where a step's time goes, in the plain loop and here: the same steps of LoRA under the same marks.

python -m benchmarks.profiles [--steps 2] writes benchmarks/results/profile.md. Blocks are not compiled: a program has
no parts. Ours: micro-batches of 1,024 tokens.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.job import BATCH, Job
from benchmarks.machine import here
from benchmarks.measure import ALIKE, GSM8K
from benchmarks.speed import PEERS

RESULT = Path("benchmarks/results/profile.md")
LOOPS = {"plain": "the plain loop", "dsft-1024": "this project"}


def profiled(model: Any, anatomy: Any, step: Callable[[int], int], steps: int) -> dict[str, Any]:
    """Seconds by part of so many steps after the first; step(index) returns its real tokens."""
    import torch

    from dsft.engine.marks import marked
    from dsft.engine.parts import STEP, links_of, seconds_by_part

    step(0)
    tokens = 0
    with marked(model, anatomy), torch.profiler.profile(acc_events=True) as profiler:
        for index in range(1, steps + 1):
            with torch.profiler.record_function(STEP):
                tokens += step(index)
    return {"tokens": tokens, "seconds": seconds_by_part(profiler.events(), links_of(profiler.profiler.kineto_results))}


def plain(job: Job) -> dict[str, Any]:
    """Of the loop on transformers and PEFT."""
    from benchmarks.peer_plain import Loop
    from dsft.engine.parts import Part, mark
    from dsft.models.anatomy import dissect

    loop = Loop(job)
    loop.update = mark(Part.OPTIMIZER)(loop.update)
    base = loop.model.get_base_model()
    anatomy = dissect(base)
    linears = {name.removesuffix(".base_layer"): role for name, role in anatomy.linears.items() if "lora_" not in name}
    return profiled(base, replace(anatomy, linears=linears), lambda index: loop.step(index)[0], job.steps - 1)


def ours(job: Job) -> dict[str, Any]:
    """Of the engine's step."""
    from benchmarks.peer_dsft import words
    from dsft.comm.world import join
    from dsft.compose import compose
    from dsft.data.open import open_data
    from dsft.engine.assemble import assemble
    from dsft.engine.loop import step_batches
    from dsft.engine.step import train_step

    run = compose(words(job)).run
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=run.train.seed)
    session = assemble(run, files, join())

    def step(index: int) -> int:
        return train_step(session, step_batches(session, data, index + 1)[1], index + 1, 1.0).tokens

    return profiled(session.model, session.anatomy, step, job.steps - 1)


def table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Milliseconds per 1,000 real tokens and shares, a row per part; the padding's are the plain loop's own."""
    heads = [f"{title}{what}" for title in LOOPS.values() for what in (", ms per 1,000 real tokens", ", share")]
    yield f"| part | {' | '.join(heads)} | ours / its |"
    yield "|---" + "|---:" * (len(heads) + 1) + "|"
    per = {name: 1e6 / each["tokens"] for name, each in found.items()}
    whole = {name: sum(each["seconds"].values()) for name, each in found.items()}
    rows = {part: {name: each["seconds"][part] for name, each in found.items()} for part in found["plain"]["seconds"]}
    for part, seconds in {**rows, "all": whole}.items():
        if not any(seconds.values()):
            continue
        cells = [f"{seconds[name] * per[name]:,.0f} | {seconds[name] / whole[name]:.1%}" for name in LOOPS]
        its, mine = (seconds[name] * per[name] for name in LOOPS)
        yield f"| {part} | {' | '.join(cells)} | {f'{mine / its:.2f}' if its else ''} |"


def main() -> int:
    """Measure and write; with --child, one loop's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2, help="profiled, after one that is not")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", choices=LOOPS)
    args = parser.parse_args()
    from dsft.compose import compose

    run = compose(["model=smollm2_135m"]).run
    job = Job("lora", run.model.resolve().name_or_path, str(GSM8K), args.steps + 1, run.train.precision, "single")
    if args.child:
        part = Job(**{**vars(job), "setting": PEERS[args.child].setting})
        print(json.dumps((plain if args.child == "plain" else ours)(part)))
        return 0
    os.environ |= ALIKE
    found = {}
    for name in LOOPS:
        command = [sys.executable, "-m", "benchmarks.profiles", "--steps", str(args.steps), "--child", name]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[name] = json.loads(said.splitlines()[-1])
    args.out.write_text(
        "# Where a step's time goes, before and after\n\n"
        f"LoRA, rank 16 on all linears, SmolLM2-135M, {BATCH} examples of GSM8K a step, {job.precision}; "
        f"{args.steps} steps. Before: transformers + PEFT, padded batches.\n"
        f"`{' '.join(['python -m benchmarks.profiles', *sys.argv[1:]])}` on {here()}.\n\n"
        + "\n".join(table(found))
        + "\n"
    )
    print(args.out.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
