"""Time and memory of a layer of fused experts: adapters by two grouped products and by PEFT's materialised delta;
experts whose own weights learn by a grouped product and by transformers' loop over experts; packed experts.

python -m benchmarks.expert_products   writes benchmarks/results/expert-products.md
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import hardware
from benchmarks.matrix_text import origin
from dsft.grouped import NAME
from dsft.methods import expert_lora
from dsft.models import experts
from dsft.quantizers.int8 import Int8Codec
from dsft.quantizers.nf4 import NF4Codec
from dsft.quantizers.stacks import pack_stacks

ROUNDS, TOKENS, RANK = 7, 512, 16
SHAPES = {"8 experts, 2 chosen": (8, 2, 1536), "64 experts, 8 chosen": (64, 8, 192)}
WIDTH = 576
PLAIN = "frozen, not packed"
PAGE = Path(__file__).with_name("results") / "expert-products.md"
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


class Peak:
    """Bytes that tensors take above the start of its context, at most: of torch's own allocations, by the profiler."""

    def __enter__(self) -> "Peak":
        self.profile = torch.profiler.profile(profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        held, self.mib = 0, 0.0
        for event in self.profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                held += event.nbytes()
                self.mib = max(self.mib, held / 2**20)


def layer(count: int, chosen: int, inner: int, dtype: torch.dtype) -> Any:
    """Qwen3-MoE's experts of this size, with random weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=WIDTH, moe_intermediate_size=inner, num_experts=count, num_experts_per_tok=chosen
    )
    config._experts_implementation = NAME
    module = Qwen3MoeExperts(config).to(dtype)
    for param in module.parameters():
        nn.init.normal_(param, std=WIDTH**-0.5)
    return module


class Held(nn.Module):
    """A model of one layer, for PEFT."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.experts = inner

    def forward(self, *args: Tensor) -> Tensor:
        return self.experts(*args)  # type: ignore[no-any-return]


def adapted(module: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name, model) of the same layer: alone, with our adapters, with PEFT's; what learns is fp32."""
    import copy

    from peft import LoraConfig, get_peft_model

    module.requires_grad_(False)
    yield "base alone", Held(module)
    mine = Held(copy.deepcopy(module))
    for key in ("gate_up_proj", "down_proj"):
        expert_lora.add(mine, f"experts.{key}", RANK, 1.0)
    for _, _, adapter in expert_lora.adapted(mine):
        adapter.A, adapter.B = (nn.Parameter(0.1 * torch.randn(param.shape)) for param in (adapter.A, adapter.B))
    yield "two grouped products", mine
    theirs = Held(copy.deepcopy(module))
    theirs.experts.config._experts_implementation = "grouped_mm"  # transformers' own
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model: Any = get_peft_model(
        theirs,
        LoraConfig(r=RANK, target_modules=[], target_parameters=targets),  # type: ignore[arg-type]
    )
    yield "PEFT's materialised delta", model


def learning(module: Any) -> Iterator[tuple[str, nn.Module]]:
    """The layer whose own weights learn, by our grouped product and by the class's own loop."""
    import copy

    module.requires_grad_(True)
    yield "grouped product", Held(module)
    other = copy.deepcopy(module)
    other.config._experts_implementation = "eager"
    yield "loop over experts", Held(other)


def packed(module: Any) -> Iterator[tuple[str, nn.Module]]:
    """The frozen layer as it is, and packed, with so many MiB of experts unpacked at a time."""
    import copy

    module.requires_grad_(False)
    yield PLAIN, Held(module)
    for name, codec in (("nf4", NF4Codec(double_quant=True)), ("int8", Int8Codec())):
        for mib in (0, 16, 1024):
            other = copy.deepcopy(module)
            pack_stacks(other, codec, compute_dtype=None, unpack_bytes=mib * 2**20)
            yield f"{name}, unpack_mib={mib}", Held(other)


def measured(
    models: dict[str, nn.Module], count: int, chosen: int, dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """Name -> (milliseconds of forward and backward, MiB above the start), the rounds of all in turns."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype)
    weights, index = torch.rand(TOKENS, count, generator=draw).softmax(-1).topk(chosen)
    times: dict[str, list[float]] = {name: [] for name in models}
    peaks: dict[str, float] = {}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            gc.collect()
            begun = time.perf_counter()
            once(model, rows, index, weights.to(dtype))
            if turn:
                times[name].append(1e3 * (time.perf_counter() - begun))
    for name, model in models.items():
        with Peak() as peak:
            once(model, rows, index, weights.to(dtype))
        peaks[name] = peak.mib
    return {name: (statistics.median(times[name]), peaks[name]) for name in models}


def once(model: nn.Module, rows: Tensor, index: Tensor, weights: Tensor) -> None:
    """One forward and backward pass, whose gradients are let go of."""
    with torch.autocast("cpu", torch.bfloat16, enabled=rows.dtype is torch.bfloat16, cache_enabled=False):
        y = model(rows.requires_grad_(), index, weights)
    y.float().square().sum().backward()
    model.zero_grad()
    rows.grad = None


def main() -> None:
    """Measure all shapes and types, write the page."""
    torch.set_num_threads(1)
    experts.register()
    here = origin()
    lines = [
        "# Products of fused experts",
        "",
        f"`python -m benchmarks.expert_products`, commit {here['commit']}, {hardware()}, one thread. Forward",
        f"and backward of one layer: {TOKENS} tokens, width {WIDTH}, adapters of rank {RANK} beside both stacks;",
        f"medians of {ROUNDS} rounds in turns; memory is what torch allocates above the start.",
        "",
        "| experts | type | what | ms | MiB | time, memory against ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape, (count, chosen, inner) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for kinds, mine in ((adapted, "two grouped products"), (learning, "grouped product"), (packed, PLAIN)):
                torch.manual_seed(0)
                found = measured(dict(kinds(layer(count, chosen, inner, dtype))), count, chosen, dtype)
                for name, (ms, mib) in found.items():
                    ratio = f"{ms / found[mine][0]:.2f}, {mib / found[mine][1]:.2f}"
                    kind = str(dtype).removeprefix("torch.")
                    lines.append(f"| {shape} | {kind} | {name} | {ms:.0f} | {mib:.0f} | {ratio} |")
                    print(lines[-1], flush=True)
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
