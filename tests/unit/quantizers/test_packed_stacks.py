"""Stacks of fused experts kept as bytes: what they compute, what they take, what is refused."""

import subprocess
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsft import grouped
from dsft.models.anatomy import dissect
from dsft.models.census import census
from dsft.packed import Codec, packed_weights, stacked
from dsft.protocols import Quantizer
from dsft.quantizers.footprint import footprint
from dsft.quantizers.int8 import Int8, Int8Codec
from dsft.quantizers.nf4 import NF4, NF4Codec
from dsft.quantizers.stacks import Bytes, pack_stacks

CODECS: dict[str, Codec] = {"nf4": NF4Codec(double_quant=True), "int8": Int8Codec()}
EXPERTS, OUT, IN = 6, 20, 33
"""Odd sides: a short last block, an odd number of 4-bit values, rows that grouped_mm does not take."""


class Experts(nn.Module):
    """Holds a stack as classes of transformers do, kept (E, in, out) where it is transposed."""

    def __init__(self, *, turned: bool, sides: Sequence[int] = (EXPERTS, OUT, IN)) -> None:
        super().__init__()
        values = torch.randn(*sides, generator=torch.Generator().manual_seed(0))
        self.is_transposed = turned
        self.up = nn.Parameter(values.transpose(1, 2).contiguous() if turned else values)


def packed(kind: str, *, turned: bool = False, unpack_bytes: int = 0, sides: Sequence[int] = (EXPERTS, OUT, IN),
           compute: torch.dtype | None = None) -> tuple[Experts, Bytes, Tensor]:  # fmt: skip
    """Module, how its stack is packed, and the stack (E, out, in) as it is unpacked."""
    module = Experts(turned=turned, sides=sides)
    pack_stacks(module, CODECS[kind], compute_dtype=compute, unpack_bytes=unpack_bytes)
    how = packed_weights(module)["up"]
    assert isinstance(how, Bytes)
    whole = how.unpack([module.get_parameter(part) for part in how.parts], torch.float32)
    return module, how, whole.transpose(1, 2) if turned else whole


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows of all experts but the second and the last, and where each expert's end."""
    ends = torch.tensor([5, 5, 9, 10, 17, 17], dtype=torch.int32)
    return torch.randn(17, IN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(), ends


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("unpack_bytes", [0, 2 * OUT * IN * 4, 2**30])
def test_product_and_gradient_equal_those_of_the_unpacked_stack(kind: str, turned: bool, unpack_bytes: int) -> None:
    module, how, whole = packed(kind, turned=turned, unpack_bytes=unpack_bytes)
    assert how.at_once == {0: 1, 2**30: EXPERTS}.get(unpack_bytes, 2)
    (x, ends), (same, _) = rows(), rows()
    y, expected = how.product(module, x, ends), grouped.product(same, whole, ends)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)  # products of memory that is aligned otherwise
    y.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-6, atol=1e-4)
    assert not how.product(module, x[:0], torch.zeros_like(ends)).numel()


@pytest.mark.parametrize("kind", CODECS)
def test_each_expert_is_packed_as_a_linear_of_its_own(kind: str) -> None:
    module, how, _ = packed(kind)
    dense = Experts(turned=False)
    for part, name in zip(CODECS[kind].shapes(OUT, IN), how.parts, strict=True):
        alone = [CODECS[kind].pack(matrix)[part].flatten() for matrix in dense.up.detach()]
        assert torch.equal(module.get_parameter(name), torch.cat(alone))


@pytest.mark.parametrize("kind", CODECS)
def test_autocast_and_compute_dtype_decide_as_for_a_linear(kind: str) -> None:
    module, how, whole = packed(kind)
    (x, ends), (same, _) = rows(), rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = how.product(module, x, ends), grouped.product(same, whole, ends)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()
    expected.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, same.grad)
    module, how, _ = packed(kind, compute=torch.float32)
    narrow = rows(torch.bfloat16)[0]
    y = how.product(module, narrow, ends)
    torch.testing.assert_close(y, grouped.product(narrow.float(), whole, ends).bfloat16())


class Live(TorchDispatchMode):
    """most: bytes that operations made, and that module had not, which are held at the same time, at most."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.most, self.before = 0, {param.untyped_storage().data_ptr() for param in module.parameters()}
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = out if isinstance(out, tuple | list) else (out,)
        self.made += [weakref.ref(tensor) for tensor in given if isinstance(tensor, Tensor)]
        live = [tensor.untyped_storage() for made in self.made if (tensor := made()) is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in live}
        self.most = max(self.most, sum(size for key, size in sizes.items() if key not in self.before))
        return out


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("at_once", [1, 2])
def test_memory_above_the_bytes_is_two_chunks_at_most(kind: str, at_once: int) -> None:
    sides = (6, 512, 384)
    chunk = at_once * 512 * 384 * 4
    module, how, _ = packed(kind, sides=sides, unpack_bytes=chunk)
    assert how.at_once == at_once
    x, ends = torch.randn(12, 384, requires_grad=True), torch.arange(2, 14, 2, dtype=torch.int32)
    with Live(module) as live:
        how.product(module, x, ends).sum().backward()
    rest = 4 * 12 * (512 + 384) * 4  # rows and their gradients, in and out, a few times
    assert chunk < live.most <= 2 * chunk + rest
    with Live(module) as all_at_once:
        how.at_once = 6
        how.product(module, x, ends).sum().backward()
    assert all_at_once.most > 2.5 * chunk  # what is measured does see the others


@pytest.mark.parametrize("kind", CODECS)
def test_the_graph_keeps_the_bytes_themselves(kind: str) -> None:
    module, how, _ = packed(kind)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        how.product(module, *rows())
    kept = {tensor.data_ptr() for tensor in saved if tensor.dtype == torch.uint8}
    assert kept == {module.get_parameter(part).data_ptr() for part in how.parts}
    assert all(tensor.dtype == torch.uint8 or tensor.shape == (EXPERTS,) for tensor in saved)


def test_a_matrix_that_cannot_be_packed_is_refused() -> None:
    _, how, _ = packed("nf4")
    good = [torch.randn(OUT, IN) for _ in range(EXPERTS)]
    with pytest.raises(RuntimeError, match="NaN or Inf"):
        how.pack([*good[:-1], good[-1].fill_(torch.nan)])
    with pytest.raises(RuntimeError, match=r"weight must be \(20, 33\), got \(33, 20\)"):
        how.pack([matrix.T for matrix in good])


def moe(kind: str = "mixtral", **config: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).bfloat16()


def test_a_base_of_mixtrals_shape_is_24_5_gb_at_4_127_bits() -> None:
    model = moe()
    anatomy = dissect(model)
    before, stacks = census(model, anatomy), [stacked(model.get_submodule(name)) for name in anatomy.experts]
    quantizer = NF4(double_quant=True, compute_dtype="auto", experts=True)
    quantizer.convert(model, anatomy)
    counted = footprint(model)
    experts = [param for name, param in model.named_parameters() if ".experts." in name]
    assert {param.dtype for param in experts} == {torch.uint8}
    assert 8 * sum(param.numel() for param in experts) / (32 * 8 * 3 * 14336 * 4096) == pytest.approx(4.127, abs=1e-3)
    assert counted.packed_bytes + counted.plain_bytes < 25e9
    assert [stacked(model.get_submodule(name)) for name in anatomy.experts] == stacks
    after = census(model, anatomy)
    assert {role: part["total"] for role, part in after["by_role"].items()} == {
        role: part["total"] for role, part in before["by_role"].items()
    }
    assert "fused experts" not in quantizer.report(model)


DBRX = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 64, "ffn_config": {"ffn_hidden_size": 96},
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 4, "clip_qkv": 8.0}}  # fmt: skip


@pytest.mark.parametrize("quantizer", [NF4, Int8])
def test_experts_that_a_class_computes_itself_are_refused_unless_they_may_stay(quantizer: Any) -> None:
    keys = {"double_quant": True} if quantizer is NF4 else {}
    model = moe("dbrx", **DBRX)
    with pytest.raises(ValueError, match=r"must pack 90% .* Dbrx\w+ computes its experts .*quantization.experts=false"):
        _converted(quantizer(compute_dtype="auto", experts=True, **keys), model)
    model = moe("dbrx", **DBRX)
    _converted(quantizer(compute_dtype="auto", experts=False, **keys), model)
    assert footprint(model).plain_parameters > footprint(model).packed_parameters > 0


def _converted(quantizer: Quantizer, model: Any) -> None:
    anatomy = dissect(model)
    quantizer.convert(model, anatomy)
    quantizer.require(model, anatomy)


SHARDED = """
import sys, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from dsft.comm.world import World
from dsft.compose import compose
from dsft.engine.assemble import skeleton
from dsft.engine.first_values import First, fill
from dsft.models.random_values import RandomValues
from dsft.packed import packed_weights
rank, size = int(sys.argv[1]), 3
read, whole = [], RandomValues.fill
RandomValues.fill = lambda values, name, out, start: (read.append((name, start)), whole(values, name, out, start))
run = compose(["model=tiny_moe", "model.init=random", "method=lora", "quantization=" + sys.argv[2], "launcher=local",
               "train.precision=fp32", "strategy=fsdp", "launcher.devices=3", "tracker=[]"]).run
files = run.model.resolve()
def loaded(world):
    bones = skeleton(run, files)
    model = bones.model
    if world.size > 1:
        run.strategy.shard(model, bones.anatomy, world, "fp32")
    fill(run, First(run, bones, files, world), model, world, first=[])
    return {n: p for n, p in model.named_parameters() if ".experts." in n}
alone = loaded(World(0, 1, 0, torch.device("cpu")))
every = len([1 for name, _ in read if "experts" in name])
read.clear()
torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
mine = loaded(World(rank, size, 0, torch.device("cpu")))
assert len([1 for name, _ in read if "experts" in name]) < every, (read, every)
for name, param in mine.items():
    chunk = alone[name].chunk(size)[rank]
    assert torch.equal(param.to_local(), chunk), name
print("equal", len(mine))
"""


@pytest.mark.parametrize(("kind", "rank"), [("nf4", 0), ("int8", 2)])
def test_a_rank_reads_and_packs_the_experts_of_its_own_bytes(kind: str, rank: int) -> None:
    command = [sys.executable, "-c", SHARDED, str(rank), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("equal"), done.stderr[-2000:]


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantization.unpack_mib must be 0 .* or more, got -1"):
        Int8(compute_dtype="auto", unpack_mib=-1)
