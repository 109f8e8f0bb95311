"""The page that benchmarks.scaling writes: three tables, each with the reason for its bends."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.collectives import on_rings

MIB = 2**20
Found = dict[str, Any]


def lengths(found: Found, tokens: int) -> Iterator[str]:
    """found: length -> CPU seconds of steps and of their attention alone; FLOPs per token."""
    yield from (
        "## Length of examples",
        "",
        f"{tokens:,} tokens a step in one micro-batch; CPU seconds of all threads per 1,000 tokens. Attention alone:",
        "forward and backward of all layers, measured beside the step.",
        "",
        "| length | step | x the shortest | attention alone | the rest | attention's share | its share of the FLOPs |",
        "|---|---|---|---|---|---|---|",
    )
    first = None
    for length, each in found.items():
        step, attention = (median(each[key]) / tokens * 1000 for key in ("step", "attention"))
        first = first or step
        products, pairs = each["flops"]
        yield (
            f"| {length} | {step:.2f} | {step / first:.2f} | {attention:.2f} | {step - attention:.2f} | "
            f"{attention / step:.0%} | {pairs / (products + pairs):.0%} |"
        )
    yield from (
        "",
        "The bend is attention: a token sees half of its example, so its pairs, and its share of the FLOPs, grow with",
        "the length. The rest is products with weights, norms and the loss, which cost the same at any length: how far",
        "its column moves is what else depends on length. Where attention's share of the time is above its share of",
        "the FLOPs, its kernel reaches less of the machine's rate than products with weights do.",
        "",
    )


def ranks(found: dict[int, Found], volumes: dict[int, Found], per_rank: int) -> Iterator[str]:
    """found: ranks -> strategy -> CPU seconds of steps, summed over ranks; volumes: what they hand to collectives."""
    yield from (
        "## Ranks on one machine",
        "",
        f"Weak scaling: {per_rank} tokens a step on each rank, one thread each; CPU seconds of all ranks per 1,000",
        "tokens of all ranks. Sent: by a rank in a step, if collectives go round rings (next section).",
        "",
        "| strategy | ranks | CPU seconds | x one process | sent, MiB | CPU seconds above one process per GiB sent |",
        "|---|---|---|---|---|---|",
    )
    alone = median(found[1]["single"]["steps"]) / per_rank * 1000
    yield f"| single | 1 | {alone:.2f} | 1.00 | 0 | |"
    for strategy in found[max(found)]:
        for size in (size for size in found if size > 1):
            cost = median(found[size][strategy]["steps"]) / (per_rank * size) * 1000
            sent = on_rings(volumes[size][f"lora {strategy}"]["counted"])
            above = (cost - alone) * per_rank / 1000 / (sent / 2**30)
            yield f"| {strategy} | {size} | {cost:.2f} | {cost / alone:.2f} | {sent / MIB:,.0f} | {above:.2f} |"
    second = found[max(found)]["zero3"]["before"] / max(found)
    yield from (
        "",
        "A token's arithmetic does not change, so what is above one process is communication (the copies into and out",
        "of flat buffers, gloo's sockets), and caches that more ranks than cores take from each other. ddp sends what",
        "learns, once a step; fsdp and zero3 send the whole base for every micro-batch, which is much beside a step as",
        "short as this: larger micro-batches (train.micro_batch_tokens) thin it out. Bytes are (N - 1) / N of the",
        "whole, so the bend is between 1 and 2 ranks; what grows beyond the bytes is the last column's. Not timed is",
        f"the start: zero3's second step takes {second:.0f} CPU seconds a rank, once, because DeepSpeed looks through",
        "its trace for each module in it (`__params_to_release`, up to stage3_max_reuse_distance, 10^9 elements).",
        "",
    )


def volumes(found: dict[int, Found], shards: int) -> Iterator[str]:
    """found: ranks -> "method strategy" -> counted and expected volumes, and by how much tensors are filled up."""
    sizes = list(found)
    yield from (
        "## Bytes that collectives carry",
        "",
        "A step of one micro-batch on rank 0 of a fake group: one process that plays one of N, through the engine's",
        "own step; tests find the same counts on 2 and on 4 real ranks. Calls: MiB of a step, the whole of what is",
        "handed over: what all-gathers give, what reduce-scatters and all-reduces are given. How much of it a rank",
        "sends is the algorithm's: **sent** is MiB on rings, (N - 1) / N of the whole and twice that for all-reduce.",
        f"hsdp: {shards} ranks a copy. Counts, losses and norms, a few calls of at most 8 KiB, are left out.",
        "",
        "| | | " + " | ".join(f"{size} ranks" for size in sizes) + " |",
        "|---|---|" + "---|" * len(sizes),
    )
    for cell, largest in found[max(sizes)].items():
        each = [found[size].get(cell) for size in sizes]
        for name in largest["expected"]:
            kind = name.rpartition(" x")[0]
            yield f"| {cell} | {kind} | " + " | ".join(_entry(one, kind) for one in each) + " |"
        sent = [f"{on_rings(one['counted']) / MIB:,.1f}" if one else "" for one in each]
        yield f"| {cell} | **sent** | " + " | ".join(sent) + " |"
    yield ""
    yield from _reasons(found[max(sizes)], max(sizes))


def _entry(cell: Found | None, kind: str) -> str:
    """Calls and MiB of a kind; a group of one rank carries nothing."""
    counted = {name.rpartition(" x"): value for name, value in cell["counted"].items()} if cell else {}
    parts = [value for (told, _, size), value in counted.items() if told == kind and size != "1"]
    return " + ".join(f"{calls}: {nbytes / MIB:,.1f}" for calls, nbytes in parts)


def _reasons(most: Found, size: int) -> Iterator[str]:
    """most: the cells on the most ranks, size."""
    (gathered, reduced), (full, _) = most["lora fsdp"]["filled"], most["full fsdp"]["filled"]
    flat = most["lora zero3"]["filled"][0]
    yield from (
        "- **ddp** does not bend: what learns is summed once a step, whatever the ranks and the micro-batches.",
        "- **fsdp** gathers every parameter twice and reduces what learns once for every micro-batch. Its bend towards",
        "  the right is filling up: FSDP2 gives each rank equally many of a tensor's rows, so that the 16 rows of a",
        f"  LoRA A become {size} on {size} ranks. With lora it gathers {gathered:.2f} x and reduces {reduced:.2f} x",
        f"  what there is, with full {full:.2f} x. The calls stay and a rank's part of each shrinks as 1 / N, so that",
        "  time goes into latency.",
        "- **hsdp** gathers and reduces among the ranks of a copy, whose number does not grow; the copies sum a shard",
        "  each, once for every micro-batch. Flat: the way out of fsdp's bend.",
        f"- **zero3** divides elements, not rows: {flat:.3f} x on {size} ranks, no bend. It gathers once where fsdp",
        "  does twice, because a model below DeepSpeed's stage3_max_live_parameters (10^9) stays gathered until",
        "  backward; a larger one, not counted here, would not.",
        "- With m micro-batches a step, all of it but ddp's is m times as much.",
        "",
    )


def wrong(found: dict[int, Found]) -> list[str]:
    """Where counted bytes are not those of the closed form."""
    lines = []
    for size, cells in found.items():
        for name, cell in cells.items():
            counted = {key: nbytes for key, (_, nbytes) in cell["counted"].items() if "numbers" not in key}
            if counted != cell["expected"]:
                lines.append(f"- {name} on {size}: counted {counted}, expected {cell['expected']}")
    return lines
