"""How cost grows: with the length of examples, with ranks on this machine, and with ranks by what collectives carry.

python -m benchmarks.scaling [--steps 2] [--model smollm2_135m] [--precision auto] writes benchmarks/results/scaling.md
LoRA r=16 on all linears, and full where collectives are counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsft_launchers.local import launch

from benchmarks import scaling_text
from benchmarks.collectives import Counted, closed_form, fake_world
from benchmarks.machine import here

RESULT = Path("benchmarks/results/scaling.md")
LENGTHS = (256, 512, 1024, 2048, 4096)
TOKENS = 4096
"""Of a step, whatever the length of its examples."""
PER_RANK = 512
"""Tokens of a step on each rank, where ranks grow."""
RANKS = (1, 2, 4)
STRATEGIES = ("ddp", "fsdp", "zero3")
SIZES = (2, 4, 16, 64, 256)
SHARDS = 4
"""Ranks that share a copy under hsdp."""
COUNTED = ("ddp", "fsdp", "hsdp", "zero3")
TRACES = 2
"""Steps in which ZeRO-3 still looks at what the model does; the next is as all that follow."""


def assembled(job: dict[str, Any], world: Any, *words: str) -> Any:
    """A session of the job's model; words: overrides."""
    from dsft.compose import compose
    from dsft.engine.assemble import assemble

    shared = [f"model={job['model']}", f"train.precision={job['precision']}", f"train.global_batch_size={world.size}"]
    run = compose([*shared, "tracker=[]", *words]).run
    return assemble(run, run.model.resolve(), world)


def batch(session: Any, lengths: list[int], seed: int) -> Any:
    """Examples of random tokens, the second half of each supervised."""
    import torch

    from dsft.objective import IGNORE, Batch

    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, session.model.config.vocab_size, (length,), generator=generator) for length in lengths]
    targets = [row.roll(-1) for row in tokens]
    for row in targets:
        row[: len(row) // 2], row[-1] = IGNORE, IGNORE
    positions = [torch.arange(length) for length in lengths]
    names = tuple(f"{seed}:{index}" for index in range(len(lengths)))
    return Batch(
        torch.cat(tokens),
        torch.cat(positions),
        torch.cat(targets),
        tuple(lengths),
        names,
        tuple(range(len(names))),
        (1,) * len(names),
    )


def measure_lengths(job: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of a step and of its attention alone, for each length of example; the lengths take turns."""
    import torch

    from benchmarks.job import Clock
    from dsft.comm.world import World
    from dsft.engine.step import train_step

    session = assembled(job, World(0, 1, 0, torch.device("cpu")), "method=lora")
    lengths = [length for length in LENGTHS if length <= session.model.config.max_position_embeddings]
    steps = {length: batch(session, [length] * (TOKENS // length), length) for length in lengths}
    train_step(session, [batch(session, [lengths[0]], 0)], 1, 1.0)
    clock = Clock()
    found: dict[str, Any] = {str(length): {"step": [], "attention": []} for length in lengths}
    for turn in range(job["steps"]):
        for length, micro_batch in steps.items():
            for name, work in (("step", lambda: train_step(session, [micro_batch], 2 + turn, 1.0)),  # noqa: B023
                               ("attention", lambda: _attention(session, micro_batch.lengths))):  # noqa: B023 # fmt: skip
                clock.begin()
                work()
                clock.end(TOKENS, 0, 0, 0.0)
                found[str(length)][name].append(clock.steps[-1].cpu_seconds)
    for length in lengths:
        found[str(length)]["flops"] = _flops(session, length)
    return found


def _attention(session: Any, lengths: tuple[int, ...]) -> None:
    """Forward and backward of attention alone, as often as the model has layers."""
    import torch

    from dsft.engine.assemble import DTYPES
    from dsft.models.attention import ragged_attention

    config, dtype = session.model.config, DTYPES[session.run.train.precision]
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    width = config.hidden_size // config.num_attention_heads
    parts = [torch.randn(1, count, sum(lengths), width, dtype=dtype, requires_grad=True) for count in heads]
    for _ in range(config.num_hidden_layers):
        output, _ = ragged_attention(torch.nn.Identity(), *parts, None, segment_lengths=lengths)
        output.backward(torch.ones_like(output))


def _flops(session: Any, length: int) -> list[float]:
    """Per token, half of them supervised: of products with weights, an adapter's too, and of attention.

    Attention: 2 products forward and 5 backward over the pairs that a causal mask leaves.
    """
    from dsft.models.work import work

    config = session.model.config
    adapter = sum(param.numel() for param in session.model.parameters() if param.requires_grad)
    pairs = (length + 1) / 2 * config.hidden_size * config.num_hidden_layers
    return [work(session.model, session.anatomy).of(1, 0.5) + 6.0 * adapter, 14.0 * pairs]


def measure_ranks(job: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of each step, summed over ranks, by strategy; of the last step before those, too."""
    import torch

    from benchmarks.job import Clock
    from dsft.comm.world import join, leave
    from dsft.engine.step import train_step

    torch.set_num_threads(1)
    world = join()
    found: dict[str, Any] = {}
    for strategy in STRATEGIES if world.size > 1 else ("single",):
        session = assembled(job, world, "method=lora", f"strategy={strategy}")
        took = []
        warm = TRACES if strategy == "zero3" else 1
        for step in range(1, job["steps"] + warm + 1):
            micro_batch = batch(session, [PER_RANK // 2] * 2, 1000 * step + world.rank)
            world.barrier()
            clock = Clock()
            train_step(session, [micro_batch], step, 1.0)
            world.barrier()
            clock.end(PER_RANK, 0, 0, 0.0)
            took.append(sum(world.gather(clock.steps[0].cpu_seconds)))
        found[strategy] = {"before": took[warm - 1], "steps": took[warm:]}
        session.run.strategy.close()
        del session
    leave()
    return found


def measure_volumes(job: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 of job["size"] hands to its collectives in a step of one micro-batch, and what closed forms say."""
    from dsft.comm.world import leave
    from dsft.engine.assemble import skeleton
    from dsft.engine.step import train_step

    found: dict[str, Any] = {}
    size = job["size"]
    world = fake_world(size)
    for strategy in COUNTED:
        shards = SHARDS if strategy == "hsdp" else size
        if size % shards:
            continue
        words = [f"strategy={strategy}", *([f"strategy.shard_size={SHARDS}"] if strategy == "hsdp" else [])]
        for method in ("lora", "full"):
            session = assembled(job, world, f"method={method}", *words)
            for step in range(1, TRACES + 1 if strategy == "zero3" else 1):
                train_step(session, [batch(session, [8], step)], step, 1.0)
            with Counted() as counted:
                train_step(session, [batch(session, [8], 3)], 3, 1.0)
            bones = skeleton(session.run, session.files)
            asked = (bones, strategy, session.run.train.precision)
            expected = closed_form(*asked, size=size, shards=shards, micro_batches=1, kept=False)
            bare = closed_form(*asked, size=1, shards=1, micro_batches=1, kept=False)
            filled = [many / one for many, one in zip(expected.values(), bare.values(), strict=True)][:2]
            found[f"{method} {strategy}"] = {"counted": counted.found, "expected": expected, "filled": filled}
            session.run.strategy.close()
            del session
    leave()
    return found


PARTS = {"lengths": measure_lengths, "ranks": measure_ranks, "volumes": measure_volumes}


def child(path: Path) -> None:
    """Measure what a job asks for; rank 0 writes what was found."""
    job = json.loads(path.read_text())
    found = PARTS[job["part"]](job)
    if os.environ.get("RANK", "0") == "0":
        Path(job["out"]).write_text(json.dumps(found))


def measured(part: str, processes: int, threads: int, **job: Any) -> dict[str, Any]:
    """A part of the benchmark, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        path, out, logs = (Path(folder) / name for name in ("job.json", "out.json", "logs"))
        path.write_text(json.dumps({"part": part, "out": str(out), **job}))
        command = [sys.executable, "-m", "benchmarks.scaling", "--child", str(path)]
        env = {"OMP_NUM_THREADS": str(threads)}
        begun = time.monotonic()
        if processes == 1:
            subprocess.run(command, env=os.environ | env, check=True)
        elif launch(command, num_processes=processes, log_dir=logs, env=env) != 0:
            raise RuntimeError("\n".join(log.read_text()[-2000:] for log in sorted(logs.iterdir())))
        print(f"{part} {job}: {time.monotonic() - begun:.0f} s", flush=True)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def main() -> int:
    """Measure and write; 1 if a count is not what its closed form says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each kind")
    parser.add_argument("--model", default="smollm2_135m")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    job = {"model": args.model, "precision": args.precision, "steps": args.steps}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # counts, not times: side by side
        counts = pool.map(lambda size: measured("volumes", 1, 1, size=size, **job), SIZES)
        volumes = dict(zip(SIZES, counts, strict=True))
    ranks = {size: measured("ranks", size, 1, **job) for size in RANKS}
    lengths = measured("lengths", 1, os.cpu_count() or 1, **job)
    wrong = scaling_text.wrong(volumes)
    lines = [
        "# How cost grows",
        "",
        f"model={args.model}, LoRA r=16 on all linears (full too, where bytes are counted), half of the tokens",
        f"supervised, train.precision={args.precision}; medians of {args.steps} steps.",
        f"`{' '.join(['python -m benchmarks.scaling', *sys.argv[1:]])}` on {here()}.",
        "",
        *scaling_text.lengths(lengths, TOKENS),
        *scaling_text.ranks(ranks, volumes, PER_RANK),
        *scaling_text.volumes(volumes, SHARDS),
        f"`closed_form` of benchmarks/collectives.py gives the same bytes{', but here:' if wrong else '.'}",
        *wrong,
    ]
    args.out.write_text("\n".join(lines) + "\n")
    print(args.out.read_text())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
