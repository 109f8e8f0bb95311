"""ZeRO on two gloo processes equals one process: losses, norms, values; all runs one after the other in one group."""

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsft.comm.world import World, join, leave
from dsft.models.anatomy import dissect
from dsft.packed import Codec
from dsft.quantizers.packed import ByteLinear
from dsft.strategies.zero import Zero

STEPS, RANKS = 6, 2
MODULE = "tests.distributed.test_zero"  # this one, as it is started on each rank
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.01),
}
TOLERANCE = 1e-5  # the house's: fp32, adamw at lr 1e-3

# method, optimizer, stage, offload, extra
CASES = {
    "lora-zero1": ("lora", "adamw", 1, "none", ""),
    "lora-zero2": ("lora", "adamw", 2, "none", ""),
    "lora-zero3": ("lora", "adamw", 3, "none", ""),
    "full-zero1": ("full", "adamw", 1, "none", ""),
    "full-zero3": ("full", "adamw", 3, "none", ""),
    "bf16-zero2": ("lora", "adamw", 2, "none", "bf16"),
    "bf16-zero3": ("packed", "adamw", 3, "none", "bf16"),
    "sgd-clipped-zero1": ("full", "sgd", 1, "none", "clip"),
    "sgd-clipped-zero3": ("full", "sgd", 3, "none", "clip"),
    "packed-zero3": ("packed", "adamw", 3, "none", ""),
    "experts-zero3": ("moe", "adamw", 3, "none", ""),
    "recomputed-zero3": ("lora", "adamw", 3, "none", "recompute"),
    "optimizer-offloaded-zero2": ("full", "adamw", 2, "optimizer", ""),
    "optimizer-offloaded-zero3": ("full", "adamw", 3, "optimizer", ""),
    "parameters-offloaded-zero3": ("lora", "adamw", 3, "parameters", ""),
    "lora-zero2-again": ("lora", "adamw", 2, "none", ""),
}


class Bytes(Codec):
    """A stand-in for a quantizer's: one byte a weight, and an odd number of bytes beside it."""

    def shapes(self, out: int, inside: int) -> dict[str, tuple[int, ...]]:
        return {"bytes": (out, inside), "tail": (7,)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        whole = (weight * 400 + 128).round().clamp(0, 255).to(torch.uint8)
        return {"bytes": whole, "tail": torch.tensor([0, 255, 1, 127, 128, 3, 200], dtype=torch.uint8)}

    def decode(self, parts: Sequence[Tensor], sides: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return ((parts[0].to(torch.float32) - 128) / 400).to(dtype)


def _model(method: str) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96 if method == "moe" else 97, "num_hidden_layers": 2,
        "vocab_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa",
    }  # fmt: skip
    with torch.device("meta"):
        if method == "moe":
            return MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **shape))
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=method == "full", **shape))
        if method == "full":
            return model
        if method == "packed":
            for name, child in list(model.model.layers.named_modules()):
                if isinstance(child, nn.Linear):
                    model.model.layers.set_submodule(name, ByteLinear(child, Bytes(), None))
        model.requires_grad_(False)
        return inject_adapter_in_model(LoraConfig(r=5, target_modules=r".*(q|v|down)_proj"), model)


def _value(module: nn.Module, name: str, own: str, param: Tensor, precision: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if isinstance(module, ByteLinear):
        return module.matrix.pack([torch.randn(module.matrix.sides, generator=generator) * 0.08])[own]
    value = torch.randn(param.shape, generator=generator) * 0.08 + ("norm" in name)
    return value.bfloat16() if precision == "bf16" and not param.requires_grad else value


def _fill(model: nn.Module, place: Callable[[nn.Module], None], precision: str) -> None:
    """Give every module its values in full, then let the strategy have it."""
    done: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for own, param in list(module.named_parameters(recurse=False)):
            if id(param) not in done:
                value = _value(module, f"{prefix}.{own}", own, param, precision)
                done[id(param)] = nn.Parameter(value, requires_grad=param.requires_grad)
            setattr(module, own, done[id(param)])
        place(module)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def _micro_batches(step: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    """1 to 3 per step; rank 0 has more than twice the labels of rank 1, and rank 1's last one may carry none."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    batches = []
    for index in range(1 + step % 3):
        tokens = torch.randint(0, 20, (2, 24 if rank == 0 else 12), generator=generator)
        targets = (tokens % 5) * 3 + 1
        targets[:, : 3 if rank == 0 else 5] = -100
        if rank == 1 and index == 2:
            targets[:] = -100
        batches.append((tokens, targets))
    return batches


COUNTS = [sum(int((t != -100).sum()) for r in range(RANKS) for _, t in _micro_batches(s, r)) for s in range(STEPS)]


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor], precision: str) -> Tensor:
    tokens, targets = batch
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def _groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return [{"params": params[::2], "lr": lr}, {"params": params[1::2], "lr": 0.5 * lr}]


@functools.cache
def single(method: str, optim: str, extra: str) -> dict[str, Any]:
    """The run on one process, in plain torch; one thread, as on the ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    precision = "bf16" if extra == "bf16" else "fp32"
    model = _model(method)
    _fill(model, lambda module: None, precision)
    model.train()
    optimizer = OPTIMIZERS[optim](_groups(model, 1e-2 if optim == "sgd" else 1e-3))
    rates = [group["lr"] for group in optimizer.param_groups]
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for rank in range(RANKS):
            for batch in _micro_batches(step, rank):
                loss = _loss(model, batch, precision) / COUNTS[step]
                loss.backward()
                total += loss.item()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1.0 - 0.1 * step)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5 if extra == "clip" else float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        norms.append(float(norm))
    torch.set_num_threads(threads)
    return {"losses": losses, "norms": norms, "weights": dict(model.named_parameters())}


def sharded(case: str, world: World) -> dict[str, Any]:
    """The same run under the strategy, with one spoilt step and one dropped step in between."""
    method, optim, stage, offload, extra = CASES[case]
    precision = "bf16" if extra == "bf16" else "fp32"
    strategy = Zero(stage=stage, offload=offload)
    model = _model(method)
    anatomy = dissect(model)
    model = strategy.shard(model, anatomy, world, precision)
    _fill(model, strategy.place, precision)
    if extra == "recompute":
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": strategy.reentrant_recompute})
    first = dict(model.named_parameters())
    held = sum(param.numel() for param in model.parameters())
    model.train()
    engine = strategy.prepare(model, _groups(model, 1e-2 if optim == "sgd" else 1e-3), OPTIMIZERS[optim])
    losses, norms = [], []
    spoilt = True
    for step in range(STEPS):
        if step == 3:
            spoilt = _spoil(strategy, engine, first, world, precision)
        total = torch.zeros((), dtype=torch.float64)
        batches = _micro_batches(step, world.rank)
        for index, batch in enumerate(batches):
            loss = _loss(engine, batch, precision) / COUNTS[step]
            strategy.backward(loss, last=index == len(batches) - 1)
            total += loss.item()
        norms.append(strategy.step(0.5 if extra == "clip" else float("inf"), 1.0 - 0.1 * step))
        losses.append(world.sum(total).item())
    weights = {name: strategy.full(param) for name, param in first.items()}
    kept = sum(param.numel() for param in model.parameters())
    strategy.close()
    return {"losses": losses, "norms": norms, "weights": weights, "spoilt": spoilt, "held": held, "kept": kept}


def _spoil(strategy: Zero, engine: nn.Module, params: dict[str, nn.Parameter], world: World, precision: str) -> bool:
    """A step that is not finite on one rank, and dropped ones: True if they moved nothing."""
    before = [strategy.full(param) for param in params.values()]
    poison = float("nan") if world.rank == world.size - 1 else 1.0
    norms = []
    for micro in (1, 2):
        for index in range(micro):
            batch = _micro_batches(1, world.rank)[index]
            strategy.backward(_loss(engine, batch, precision) * poison, last=index == micro - 1)
        norms.append(strategy.step(1.0, 1.0))
    for last in (False, True):
        strategy.backward(_loss(engine, _micro_batches(0, world.rank)[0], precision), last=last)
        strategy.drop()
    engine.eval()
    with torch.no_grad():
        _loss(engine, _micro_batches(2, world.rank)[0], precision)
    engine.train()
    after = [strategy.full(param) for param in params.values()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return same and not any(torch.isfinite(torch.tensor(norms)))


def _serve(folder: Path) -> None:
    world = join()
    for case in CASES:
        result = sharded(case, world)
        if world.rank == 0:
            torch.save(result, folder / f"{case}.pt")
    leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("zero")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(RANKS):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks.append(subprocess.Popen([sys.executable, "-m", MODULE, str(folder)], env=env, **pipes))
    printed = "".join(rank.communicate(timeout=300)[0] for rank in ranks)
    assert all(rank.returncode == 0 for rank in ranks), printed[-6000:]
    return folder, printed


@pytest.mark.parametrize("case", CASES)
def test_zero_equals_single(case: str, results: tuple[Path, str]) -> None:
    method, optim, stage, _, extra = CASES[case]
    found, wanted = torch.load(results[0] / f"{case}.pt"), single(method, optim, extra.replace("recompute", ""))
    tolerance = 5e-3 if extra == "bf16" else TOLERANCE  # bf16: another order of sums moves a rounding of 2^-8
    weight = 0.0
    for name, other in wanted["weights"].items():
        value = found["weights"][name]
        if other.requires_grad:
            weight = max(weight, ((value - other.detach()).norm() / other.norm()).item())
        else:
            assert value.dtype == other.dtype
            assert torch.equal(value, other), f"{name} is frozen and moved"
    assert abs(wanted["losses"][-1] / wanted["losses"][0] - 1) > 0.01, "the loss must move"
    assert found["spoilt"], "a spoilt or dropped step moved something"
    assert found["losses"] == pytest.approx(wanted["losses"], rel=tolerance)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=tolerance)
    assert weight < tolerance
    if stage == 3:
        assert found["held"] == found["kept"] == 0, "a whole parameter stayed on a rank"


def test_deepspeed_prints_nothing(results: tuple[Path, str]) -> None:
    assert results[1] == ""


@pytest.mark.parametrize(("stage", "offload", "message"), [(2, "parameters", "zero3"), (4, "none", "1, 2 or 3")])
def test_what_deepspeed_has_not_is_refused(stage: int, offload: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Zero(stage=stage, offload=offload)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
