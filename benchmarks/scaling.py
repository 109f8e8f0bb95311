"""How cost grows: with the length of examples, with ranks on this machine, and with ranks by what collectives carry.

python -m benchmarks.scaling [--steps 2] [--tokens 4096]   writes benchmarks/results/scaling.md; SmolLM2-135M.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsft_launchers.local import launch

from benchmarks.machine import here

RESULT = Path("benchmarks/results/scaling.md")
LENGTHS = (256, 512, 1024, 2048, 4096)
PER_RANK = 512
"""Tokens of a step on each rank, where ranks grow."""
RANKS = (1, 2, 4)
STRATEGIES = {"ddp": [], "fsdp": [], "zero3": []}
SIZES = (2, 4, 16, 64, 256)
SHARDS = 4
"""Ranks that share a copy under hsdp."""
COUNTED = {"ddp": [], "fsdp": [], "hsdp": [f"strategy.shard_size={SHARDS}"], "zero3": []}
MIB = 2**20


def assembled(words: list[str], world: Any) -> Any:
    """A session of the embedded model; words: overrides."""
    from dsft.compose import compose
    from dsft.engine.assemble import assemble

    run = compose(["model=smollm2_135m", "tracker=[]", "train.max_grad_norm=inf", *words]).run
    return assemble(run, run.model.resolve(), world)


def batch(lengths: list[int], seed: int) -> Any:
    """Examples of random tokens, the second half of each supervised."""
    import torch

    from dsft.protocols import IGNORE, Batch

    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, 49152, (length,), generator=generator) for length in lengths]
    targets = [row.roll(-1) for row in tokens]
    for row in targets:
        row[: len(row) // 2], row[-1] = IGNORE, IGNORE
    positions = [torch.arange(length) for length in lengths]
    names = tuple(f"{seed}:{index}" for index in range(len(lengths)))
    return Batch(torch.cat(tokens), torch.cat(positions), torch.cat(targets), tuple(lengths), names)


def measure_lengths(job: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of a step and of its attention alone, for each length of example; the lengths take turns."""
    from benchmarks.speed import Clock
    from dsft.comm.world import World, torch
    from dsft.engine.step import train_step

    session = assembled(["method=lora"], World(0, 1, 0, torch.device("cpu")))
    steps = {length: batch([length] * (job["tokens"] // length), length) for length in LENGTHS}
    train_step(session, [steps[LENGTHS[0]]], 1, 1.0)
    clock = Clock()
    found: dict[str, Any] = {str(length): {"step": [], "attention": []} for length in LENGTHS}
    for turn in range(job["steps"]):
        for length, micro_batch in steps.items():
            clock.begin()
            train_step(session, [micro_batch], 2 + turn, 1.0)
            clock.end(job["tokens"], 0, 0, 0.0)
            found[str(length)]["step"].append(clock.steps[-1].cpu_seconds)
            clock.begin()
            _attention(session, micro_batch.lengths)
            clock.end(job["tokens"], 0, 0, 0.0)
            found[str(length)]["attention"].append(clock.steps[-1].cpu_seconds)
    for length in LENGTHS:
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
    """Per token: of matrix products with weights, and of attention.

    2 per weight forward and 2 for the input's gradient; 2 more for an adapter's own; the head where a target is. Of
    attention, 2 products forward and 5 backward over the pairs that are seen.
    """
    model, anatomy = session.model, session.anatomy
    frozen = sum(model.get_submodule(f"{name}.base_layer").weight.numel() for name in anatomy.linears)
    learning = sum(param.numel() for param in model.parameters() if param.requires_grad)
    head = model.get_submodule(anatomy.head).weight.numel()
    config = model.config
    return [4.0 * frozen + 6.0 * learning + 4.0 * head / 2,
            14.0 * (length + 1) / 2 * config.hidden_size * config.num_hidden_layers]  # fmt: skip


def measure_ranks(job: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of a step, summed over ranks, for each strategy; one warm-up."""
    import torch

    from benchmarks.speed import Clock
    from dsft.comm.world import join, leave
    from dsft.engine.step import train_step

    torch.set_num_threads(1)
    world = join()
    found: dict[str, Any] = {}
    for strategy, words in STRATEGIES.items() if world.size > 1 else [("single", [])]:
        session = assembled(
            ["method=lora", f"strategy={strategy}", f"train.global_batch_size={world.size}", *words], world
        )
        clock, took = Clock(), []
        for step in range(1, job["steps"] + 3):
            world.barrier()
            clock.begin()
            train_step(session, [batch([PER_RANK // 2] * 2, 1000 * step + world.rank)], step, 1.0)
            world.barrier()
            clock.end(PER_RANK, 0, 0, 0.0)
            took.append(sum(world.gather(clock.steps[-1].cpu_seconds)))
        found[strategy] = took[2:]  # the first also builds what lasts, under ZeRO-3 the second traces once more
        session.run.strategy.close()
        del session
    leave()
    return found


def measure_volumes(job: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 of job["size"] hands to its collectives in a step of one micro-batch, and the closed forms."""
    from benchmarks.collectives import Counted, closed_form, fake_world
    from dsft.comm.world import leave
    from dsft.engine.assemble import skeleton
    from dsft.engine.step import train_step

    found: dict[str, Any] = {}
    size = job["size"]
    world = fake_world(size)
    for strategy, words in COUNTED.items():
        if strategy == "hsdp" and size % SHARDS:
            continue
        for method in ("lora", "full"):
            overrides = [f"method={method}", f"strategy={strategy}", f"train.global_batch_size={size}", *words]
            session = assembled(overrides, world)
            for step in (1, 2):
                train_step(session, [batch([8], step)], step, 1.0)
            with Counted() as counted:
                train_step(session, [batch([8], 3)], 3, 1.0)
            run = session.run
            expected = closed_form(skeleton(run, session.files), strategy, size, SHARDS if strategy == "hsdp" else size, 1)
            found[f"{method} {strategy}"] = {"counted": counted.found, "expected": expected}
            session.run.strategy.close()
            del session
    leave()
    return found


PARTS = {"lengths": measure_lengths, "ranks": measure_ranks, "volumes": measure_volumes}


def child(path: Path) -> int:
    """Measure what a job asks for; rank 0 writes what was found."""
    job = json.loads(path.read_text())
    found = PARTS[job["part"]](job)
    if os.environ["RANK"] == "0":
        Path(job["out"]).write_text(json.dumps(found))
    return 0


def measured(part: str, processes: int, threads: int, **job: Any) -> dict[str, Any]:
    """A part of the benchmark in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        path, out, logs = (Path(folder) / name for name in ("job.json", "out.json", "logs"))
        path.write_text(json.dumps({"part": part, "out": str(out), **job}))
        command = [sys.executable, "-m", "benchmarks.scaling", "--child", str(path)]
        env = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        if launch(command, num_processes=processes, log_dir=logs, env=env) != 0:
            raise RuntimeError("\n".join(log.read_text()[-2000:] for log in sorted(logs.iterdir())))
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=Path)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    return 0


if __name__ == "__main__":
    sys.exit(main())
