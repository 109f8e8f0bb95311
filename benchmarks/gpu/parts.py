"""Check C4: parts of a step by themselves: how AdamW moves, logits at a time, attention in a loop or at once, norms,
copies to the device, and Liger's head where it is installed.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu.batches import ragged
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.scene import Scene
from dsft.models import scoring
from dsft.models.attention import ragged_attention

HEAD = {True: (8192, 4096, 128256), False: (64, 128, 2048)}
"""Rows, width and vocabulary of the head, with a GPU and without."""


def parts(scene: Scene, facts: Facts) -> None:
    """Milliseconds of each."""
    for name, part in {
        "AdamW": _adamw, "the head": _head, "attention": _attention, "norms": _norms, "copies": _copies,
        "Liger's head": _liger,
    }.items():  # fmt: skip
        with facts.part(name):
            part(scene, facts)
        scene.forget()


def _told(facts: Facts, what: str, seconds: float) -> None:
    facts.note(what, round(1000 * seconds, 3), "ms", ok=seconds > 0)


def _adamw(scene: Scene, facts: Facts) -> None:
    """448 factors of rank 16, as LoRA has on an 8B shape."""
    count, width = (448, 4096) if scene.cuda else (32, 64)
    for way in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        params = [nn.Parameter(scene.normal(16, width, seed=seed)) for seed in range(count)]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = torch.optim.AdamW(params, lr=1e-4, **way)
        _told(facts, f"AdamW {'loop' if way == {'foreach': False} else next(iter(way))}, {count} factors",
              scene.seconds(optimizer.step, calls=5))  # fmt: skip


def _head(scene: Scene, facts: Facts) -> None:
    rows, width, vocabulary = HEAD[scene.cuda]
    dtype = torch.bfloat16 if scene.cuda else torch.float32
    weight = scene.normal(vocabulary, width, dtype=dtype) * 0.02
    hidden = scene.normal(rows, width, dtype=dtype, seed=1).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=scene.device)
    kept = scoring.AT_ONCE
    try:
        for power in range(25, 30) if scene.cuda else (14, 16):
            scoring.AT_ONCE = 2**power

            _told(facts, f"head of {rows} rows, 2^{power} logits at a time",
                  scene.seconds(_scored(hidden, weight, targets), calls=3))  # fmt: skip
    finally:
        scoring.AT_ONCE = kept


def _scored(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Any:
    def call() -> None:
        hidden.grad = None
        scoring._Score.apply(hidden, weight, None, targets, (1.0, False)).sum().backward()

    return call


def _attention(scene: Scene, facts: Facts) -> None:
    """One layer, forward and backward: a call per example, and torch's kernel for all of them."""
    heads, groups, width = (32, 8, 128) if scene.cuda else (4, 2, 16)
    dtype = torch.bfloat16 if scene.cuda else torch.float32
    for tokens in (2048, 8192, 16384) if scene.cuda else (256,):
        lengths = ragged(tokens, 100, seed=0).lengths
        given = [
            scene.normal(1, count, tokens, width, dtype=dtype, seed=count) for count in (heads, groups, groups + 1)
        ]
        given[2] = given[2][:, :groups].contiguous()
        leaves = [value.requires_grad_() for value in given]

        _told(
            facts,
            f"attention in a loop, {tokens} tokens, {len(lengths)} examples",
            scene.seconds(_in_a_loop(leaves, lengths), calls=5),
        )
        if scene.cuda:
            _told(facts, f"attention at once, {tokens} tokens, {len(lengths)} examples",
                  scene.seconds(_at_once(leaves, lengths), calls=5))  # fmt: skip


def _in_a_loop(leaves: list[torch.Tensor], lengths: tuple[int, ...]) -> Any:
    def call() -> None:
        ragged_attention(nn.Identity(), *leaves, None, segment_lengths=lengths)[0].sum().backward()

    return call


def _at_once(leaves: list[torch.Tensor], lengths: tuple[int, ...]) -> Any:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths], device=leaves[0].device).cumsum(0).to(torch.int32)
    given = [leaf.detach()[0].transpose(0, 1).contiguous().requires_grad_() for leaf in leaves]
    more: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def call() -> None:
        out = varlen_attn(*given, ends, ends, max(lengths), max(lengths), window_size=(-1, 0), **more)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()

    return call


def _norms(scene: Scene, facts: Facts) -> None:
    rows, width = (8192, 4096) if scene.cuda else (256, 128)
    x = scene.normal(rows, width, dtype=torch.bfloat16 if scene.cuda else torch.float32)
    weight = torch.ones(width, dtype=x.dtype, device=x.device)

    def eager() -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    _told(facts, "RMS norm in parts, as transformers has it", scene.seconds(eager))
    _told(facts, "RMS norm, torch's own", scene.seconds(lambda: F.rms_norm(x, (width,), weight, 1e-5)))


def _copies(scene: Scene, facts: Facts) -> None:
    size = 2**26 if scene.cuda else 2**20
    kinds = {"pageable": torch.empty(size, dtype=torch.uint8)}
    if scene.cuda:
        kinds["pinned"] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for name, host in kinds.items():
        took = scene.seconds(lambda host=host: host.to(scene.device, non_blocking=True, copy=True))
        facts.note(f"copy to the device, {name}", round(size / took / 1e9, 2), "GB/s", ok=took > 0)


def _liger(scene: Scene, facts: Facts) -> None:
    if not scene.cuda or importlib.util.find_spec("liger_kernel") is None:
        facts.note("Liger's head", "not possible: no GPU, or liger-kernel is not installed")
        return
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    rows, width, vocabulary = HEAD[True]
    weight = scene.normal(vocabulary, width, dtype=torch.bfloat16) * 0.02
    hidden = scene.normal(rows, width, dtype=torch.bfloat16, seed=1).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=scene.device)
    loss = LigerFusedLinearCrossEntropyLoss()
    _told(
        facts, f"Liger's head of {rows} rows", scene.seconds(lambda: loss(weight, hidden, targets).backward(), calls=3)
    )
