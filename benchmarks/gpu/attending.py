"""Check A3: ragged attention against fp64, the kernel that ran, torch's varlen kernel, and the host syncs of a step."""

import inspect
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.facts import Facts
from benchmarks.gpu.runs import tiny_words, written_rows
from benchmarks.gpu.scene import Scene
from dsft.compose import compose
from dsft.data.open import open_data
from dsft.engine.assemble import assemble
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step
from dsft.models.attention import ragged_attention

SYNC = "called a synchronizing CUDA operation"
"""What torch warns of in set_sync_debug_mode("warn")."""
NEAR = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Of the largest number of the exact result: bf16 keeps 8 bits, fp32 is summed in another order."""


@dataclass(frozen=True)
class Case:
    """heads of queries and of keys; width of a head; lengths of the examples; window: None for all that came before."""

    heads: int
    groups: int
    width: int
    lengths: tuple[int, ...]
    window: int | None
    dtype: torch.dtype

    def __str__(self) -> str:
        """Name it."""
        kind = str(self.dtype).removeprefix("torch.")
        window = f", window {self.window}" if self.window else ""
        return f"{kind}, {self.heads}/{self.groups} heads of {self.width}{window}"


def attending(scene: Scene, facts: Facts) -> None:
    """Outputs and gradients of each case; then what stands beside."""
    for case in _cases(scene):
        with facts.part(f"attention: {case}"):
            _case(scene, case, facts)
    if scene.cuda:
        for window in (None, 512):
            with facts.part(f"varlen_attn, window {window}"):
                _varlen(scene, Case(32, 8, 128, (1024, 777), window, torch.bfloat16), facts)
        with facts.part("host syncs"):
            _syncs(scene, facts)
    else:
        facts.note("varlen_attn, host syncs", "not possible on a CPU")


def _cases(scene: Scene) -> list[Case]:
    half, full = torch.bfloat16, torch.float32
    if not scene.cuda:
        cases = [(16, None, half), (16, 32, half), (16, None, full), (16, 32, full)]
        return [Case(4, 2, width, (96, 33), window, dtype) for width, window, dtype in cases]
    cases = [(width, None, half) for width in (64, 128, 256, 512)]
    cases += [(128, 512, half), (64, None, full), (128, 512, full)]
    return [Case(32, 8, width, (1024, 777), window, dtype) for width, window, dtype in cases]


def _given(scene: Scene, case: Case) -> list[Tensor]:
    """Queries, keys, values, and a gradient of the output."""
    total = sum(case.lengths)
    sizes = [(1, case.heads, total), (1, case.groups, total), (1, case.groups, total), (1, total, case.heads)]
    return [scene.normal(*size, case.width, dtype=case.dtype, seed=seed) for seed, size in enumerate(sizes)]


def _case(scene: Scene, case: Case, facts: Facts) -> None:
    *given, slope = _given(scene, case)
    leaves = [value.detach().requires_grad_() for value in given]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        out, _ = ragged_attention(
            nn.Identity(), *leaves, None, segment_lengths=case.lengths, sliding_window=case.window,
            scaling=case.width**-0.5,
        )  # fmt: skip
    out.backward(slope)
    _compare(str(case), [out, *(leaf.grad for leaf in leaves)], _exact(case, given, slope), facts, case.dtype)
    ran = sorted({event.key.removeprefix("aten::") for event in profiler.key_averages() if "_attention" in event.key})
    kernels = [name for name in ran if name != "scaled_dot_product_attention"]
    whole = any("math" in name for name in kernels)
    facts.note(f"{case}: kernel", ", ".join(kernels), ok=not (whole and scene.cuda), why="must keep no whole scores")


def _compare(what: str, found: list[Any], wanted: list[Tensor], facts: Facts, dtype: torch.dtype) -> None:
    off = [
        float((one.double() - other).abs().max() / other.abs().max()) for one, other in zip(found, wanted, strict=True)
    ]
    facts.near(f"{what}: output off by", off[0], NEAR[dtype])
    facts.near(f"{what}: gradients off by", max(off[1:]), 2 * NEAR[dtype])


def _exact(case: Case, given: list[Tensor], slope: Tensor) -> list[Tensor]:
    """Output (1, T, H, D) and the gradients of queries, keys and values, in fp64 by the definition."""
    leaves = [value.detach().double().requires_grad_() for value in given]
    each = case.heads // case.groups
    outputs = []
    for query, key, value in zip(*(leaf.split(case.lengths, 2) for leaf in leaves), strict=True):
        length = query.shape[2]
        rows = torch.arange(length, device=query.device)[:, None]
        seen = rows >= rows.T
        if case.window:
            seen = seen & (rows - rows.T < case.window)
        key, value = (part.repeat_interleave(each, 1) for part in (key, value))
        scores = (query @ key.transpose(2, 3)) * case.width**-0.5
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2))
    out = torch.cat(outputs, 1)
    out.backward(slope.double())
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _varlen(scene: Scene, case: Case, facts: Facts) -> None:
    """torch's own kernel over all examples at once: does it take heads in groups, forward and backward?"""
    from torch.nn.attention.varlen import varlen_attn

    *given, slope = _given(scene, case)
    leaves = [value[0].transpose(0, 1).contiguous().requires_grad_() for value in given]  # (T, H, D)
    ends = torch.tensor([0, *case.lengths], device=scene.device).cumsum(0).to(torch.int32)
    more: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    window = (-1 if case.window is None else case.window - 1, 0)
    longest = max(case.lengths)
    out = varlen_attn(*leaves, ends, ends, longest, longest, window_size=window, **more)
    assert isinstance(out, Tensor)
    out.backward(slope[0])
    grads = [leaf.grad.transpose(0, 1)[None] for leaf in leaves if leaf.grad is not None]
    _compare(f"varlen_attn: {case}", [out[None], *grads], _exact(case, given, slope), facts, case.dtype)


def _syncs(scene: Scene, facts: Facts) -> None:
    """How often the host waits for the device in one step of one micro-batch, and where."""
    run = compose(tiny_words(written_rows(scene), "lora", precision="bf16")).run
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=run.train.max_length, seed=0)
    session = assemble(run, files, scene.world)
    for step in (1, 2):
        train_step(session, step_batches(session, data, step)[1], step, 1.0)
    batches = step_batches(session, data, 3)[1]
    sites: Counter[str] = Counter()

    def heard(message: Any, *_: Any, **__: Any) -> None:
        if SYNC in str(message):
            frames = [frame for frame in traceback.extract_stack() if "/dsft/" in frame.filename]
            sites[f"{frames[-1].filename.rpartition('/dsft/')[2]}:{frames[-1].lineno}" if frames else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = heard
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_step(session, batches, 3, 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = ", ".join(f"{site} x{count}" for site, count in sites.most_common(12))
    facts.note(f"host syncs in a step of {len(batches)} micro-batches", sum(sites.values()))
    facts.note("where", told)
