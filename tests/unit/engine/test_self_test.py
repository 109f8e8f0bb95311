"""A run starts where its packed weights are the bytes that its device packs, and only there."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from benchmarks.rounded import Rounded
from dsft.comm.world import World, leave
from dsft.compose import compose
from dsft.config import Run
from dsft.data.open import open_data
from dsft.engine.assemble import Session, _check_blocks, _check_family, assemble
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step
from dsft.methods.pissa import principal
from dsft.models.anatomy import dissect
from dsft.models.build import build_meta
from dsft.models.checkpoint_values import CheckpointValues
from dsft.models.family import PACKS
from dsft.strategies import fsdp
from dsft.strategies.single import Single

ALONE = World(0, 1, 0, torch.device("cpu"))


def run_of(*words: str) -> Run:
    return compose([
        "model=tiny", "data=reasoning_gym", "data.size=16", "data.eval_size=0", "tracker=[]", "launcher=local",
        "train.global_batch_size=1", "train.steps=2", "optim.lr=1e-2", "optim.schedule=constant", *words,
    ]).run  # fmt: skip


def started(run: Run) -> Session:
    return assemble(run, run.model.resolve(), ALONE)


@pytest.fixture
def other_sums(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is read onto the run's device has means with another last bit, as a GPU's sums in another order have.

    Gives those means.
    """
    given: list[Tensor] = []
    there, read, mean = [False], CheckpointValues.full, torch.Tensor.mean

    def full(values: CheckpointValues, name: str, device: torch.device | None = None) -> Tensor:
        there[0] = device is not None
        return read(values, name, device)

    def last_bit(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found = mean(value, *args, **kwargs)
        if there[0] and not args and not kwargs:  # of scales, as they are packed, and not of a norm's rows
            found = torch.nextafter(found, torch.full_like(found, torch.inf))
            given.append(found)
        return found

    monkeypatch.setattr(CheckpointValues, "full", full)
    monkeypatch.setattr(torch.Tensor, "mean", last_bit)
    return given


def test_a_device_that_sums_in_another_order_starts_and_is_read_as_it_packs(other_sums: list[Tensor]) -> None:
    run = run_of("method=pissa", "method.iterations=null", "quantization=nf4", "train.precision=fp32")
    layers: list[Any] = [module for module in started(run).model.modules() if hasattr(module, "start_a")]
    assert len(other_sums) == 1 + 2 * len(layers)  # each is packed for the model and for its start, one for the test
    for layer in layers:
        factors = principal(layer.base_layer.unpack(), layer.r["default"], layer.scaling["default"], None)
        assert torch.equal(layer.start_a.weight, factors["a"])
        assert torch.equal(layer.start_b.weight, factors["b"])


@dataclass(kw_only=True)
class Flips(Single):
    """One process on which a bit of what is packed flips once it is loaded."""

    part: str

    def place(self, module: nn.Module) -> None:
        """Flip the lowest bit of the last byte."""
        if self.part in module._parameters:
            module.get_parameter(self.part).data.view(-1)[-1] ^= 1


@pytest.mark.usefixtures("other_sums")
@pytest.mark.parametrize("part", ["payload", "absmax", "nested", "gate_up_proj_payload", "gate_up_proj_nested"])
def test_a_bit_that_flips_stops_the_start(part: str) -> None:
    run = run_of("model=tiny_moe" if "_proj_" in part else "model=tiny", "method=qlora", "train.precision=fp32")
    with pytest.raises(RuntimeError, match=rf"\.{part}: the packed weight .* Flips does not carry its bytes"):
        started(replace(run, strategy=Flips(part=part)))


@pytest.fixture
def casts_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FSDP2's rule in torch 2.11: parameters that are no float are cast as well."""

    def init_dtype_attrs(param: FSDPParam, policy: MixedPrecisionPolicy) -> None:
        param.orig_dtype = param.sharded_param.dtype
        param.reduce_dtype = None if policy.reduce_dtype == policy.param_dtype else policy.reduce_dtype
        param.param_dtype = None if policy.param_dtype == param.orig_dtype else policy.param_dtype

    monkeypatch.setattr(FSDPParam, "init_dtype_attrs", init_dtype_attrs)
    yield
    leave()


def losses(*words: str) -> list[float]:
    run = run_of("train.precision=bf16", *words)
    session = started(run)
    data = open_data(run.data, session.files.tokenizer(), max_length=512, seed=0)
    with Rounded():  # a processor without bf16 would take ten times as long
        done = [train_step(session, step_batches(session, data, step)[1], step, 1.0) for step in (1, 2)]
    run.strategy.close()
    return [step.loss for step in done]


@pytest.mark.usefixtures("casts_all")
@pytest.mark.parametrize(("quantization", "strategy"), [("nf4", "fsdp"), ("int8", "hsdp")])
def test_packed_weights_are_right_where_fsdp_casts_all(quantization: str, strategy: str) -> None:
    words = ("method=lora", f"quantization={quantization}")
    alone = losses(*words, "strategy=single")
    assert abs(alone[1] - alone[0]) > 0.05
    # the same products, rounded in the same places
    assert losses(*words, f"strategy={strategy}") == pytest.approx(alone, abs=2e-3)


@pytest.mark.usefixtures("casts_all")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_cast_of_packed_bytes_stops_the_start(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    monkeypatch.setattr(fsdp, "MixedPrecisionPolicy", lambda **_: everywhere)
    with pytest.raises(RuntimeError, match=r"FSDP does not carry its bytes .*\(torch.uint8 became torch.bfloat16\)"):
        losses("method=lora", f"quantization={quantization}", "strategy=fsdp")


@pytest.mark.parametrize("words", [["strategy=zero3"], ["strategy=zero2"], ["strategy=fsdp"]])
def test_stage_3_refuses_blocks_that_are_called_without_a_gradient(words: list[str]) -> None:
    run = compose(["model=tiny", "launcher.devices=2", *words], planning=True).run
    model = build_meta(run.files(), torch.float32)
    _check_family(run, model, PACKS)
    with pytest.raises(ValueError, match="take strategy=fsdp") if words == ["strategy=zero3"] else nullcontext():
        _check_family(run, model, replace(PACKS, graded=False))


@pytest.mark.parametrize(("words", "refused"), [
    (["method=lora"], False), (["method=full"], True), (["method=full", "train.precision=fp32"], False),
])  # fmt: skip
def test_a_class_that_fails_in_bf16_is_refused_where_it_would(words: list[str], refused: bool) -> None:
    run = compose(["model=tiny", "train.precision=bf16", *words], planning=True).run
    model = build_meta(run.files(), torch.float32)
    with pytest.raises(ValueError, match=r"train.precision must be fp32") if refused else nullcontext():
        _check_family(run, model, replace(PACKS, bf16_whole=False))


@pytest.mark.parametrize("strategy", ["fsdp", "zero3", "ddp", "zero2"])
def test_blocks_that_share_parameters_are_not_sharded_one_by_one(strategy: str) -> None:
    """As Zamba's do: a block that is gathered would find its parameters freed by another."""
    run = compose(["model=tiny", f"strategy={strategy}", "launcher.devices=2"], planning=True).run
    model = build_meta(run.files(), torch.float32)
    anatomy = dissect(model)
    _check_blocks(run, model, anatomy)
    first, second = (model.get_submodule(name) for name in anatomy.blocks[:2])
    second.mlp = first.mlp
    if not run.strategy.shards_blocks:
        _check_blocks(run, model, anatomy)
        return
    with pytest.raises(ValueError, match=r"strategy must leave blocks whole for LlamaForCausalLM, as .* share param"):
        _check_blocks(run, model, anatomy)
