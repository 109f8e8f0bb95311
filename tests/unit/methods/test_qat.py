"""qat and qat_lora: what is trained is what a real conversion gives; what they leave is that; what they refuse."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM

from dsft.compose import compose
from dsft.data.open import Dataset
from dsft.engine.assemble import Session, Skeleton, skeleton
from dsft.engine.loop import step_batches
from dsft.engine.result import write_result
from dsft.engine.step import train_step
from dsft.export import merged_and_beside
from dsft.methods.grid import BITS, grid_of, load
from dsft.models.anatomy import dissect
from dsft.models.build import build_meta
from tests.contract.sessions import batch_of, session_of
from tests.unit.methods.test_grid import theirs

TOKENS = torch.arange(40)[None] + 60


def train(session: Session, data: Dataset, *steps: int) -> None:
    for step in steps:
        assert train_step(session, step_batches(session, data, step)[1], step, 1.0).moved


def logits(model: Any) -> Tensor:
    """Under the attention that the model has, which wants to be told that the tokens are one example if it is ours."""
    ours = "dsft" in str(model.config._attn_implementation)
    length = TOKENS.numel()
    known = {"segment_lengths": (length,), "position_ids": torch.arange(length)[None]} if ours else {}
    with torch.no_grad():
        value: Tensor = model.eval()(input_ids=TOKENS, use_cache=False, **known).logits
    return value


def convert(model: Any, names: list[str], scheme: str) -> None:
    """torchao's real conversion of these linears, which must be plain ones."""
    for name in names:
        model.get_submodule(name).__class__ = nn.Linear
    quantize_(model, theirs(scheme), filter_fn=lambda module, name: name in names)


def bones_of(*words: str) -> Skeleton:
    run = compose(["model=tiny", "launcher=local", *words]).run
    return skeleton(run, run.model.resolve())


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("integers-*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # no dict
    return found


@pytest.mark.parametrize("scheme", BITS)
def test_the_trained_model_is_the_really_converted_one_to_the_bit(scheme: str, tmp_path: Path) -> None:
    session, data = session_of("qat", f"method.scheme={scheme}")
    train(session, data, 1, 2)
    expected = logits(session.model)
    write_result(session, tmp_path)
    names = session.run.method.grid.linears(session.model, session.anatomy)
    convert(session.model, names, scheme)
    assert float((logits(session.model) - expected).abs().max()) == 0.0
    read = load(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), tmp_path)
    for name in names:
        real, mine = (model.get_submodule(name).weight for model in (session.model, read))
        assert torch.equal(real.qdata, mine.qdata)
        assert torch.equal(real.scale, mine.scale)
        assert torch.equal(real.zero_point, mine.zero_point)
        assert real.activation_quantization == mine.activation_quantization
    assert len(stored(tmp_path)) == 3 * len(names)


def test_converted_without_training_it_is_plain_rounding(tmp_path: Path) -> None:
    session, _ = session_of("qat")
    write_result(session, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(session.files.folder, dtype=torch.float32)
    names = [*session.anatomy.linears]
    quantize_(base, theirs("int4"), filter_fn=lambda module, name: name in names)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, param in read.named_parameters():
        other: Any = base.get_parameter(name)
        other = other.dequantize() if name.removesuffix(".weight") in names else other
        assert torch.equal(param, other), name


def test_only_the_linears_of_the_blocks_are_rounded() -> None:
    session, _ = session_of("qat")
    rounding = {name for name, module in session.model.named_modules() if hasattr(module, "grid")}
    assert rounding == set(session.anatomy.linears)
    assert {session.anatomy.head, session.anatomy.embedding}.isdisjoint(rounding)


@pytest.mark.parametrize("words", [(), ("method.target_modules=[q_proj,down_proj]",)])
@pytest.mark.parametrize("scheme", BITS)
def test_merged_and_then_rounded_qat_lora_is_the_trained_model_to_the_bit(
    scheme: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    session, data = session_of("qat_lora", f"method.scheme={scheme}", "optim.lr=1e-2", *words)
    train(session, data, 1, 2)
    expected = logits(session.model)
    write_result(session, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(session.files.folder, dtype=torch.float32)
    plain: Any = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    model, beside = merged_and_beside(session.run, tmp_path)
    convert(plain, [*session.anatomy.linears], scheme)
    for name in session.anatomy.linears:
        weight: Any = plain.get_submodule(name).weight
        assert torch.equal(weight.dequantize(), model.get_submodule(name).weight)
        assert torch.equal(weight.scale, beside[f"{name}.weight.scales"])
    live = session.model
    with torch.no_grad():
        for name in session.anatomy.linears:
            parent, _, leaf = name.rpartition(".")
            setattr(live.get_submodule(parent), leaf, plain.get_submodule(name))
    assert float((logits(live) - expected).abs().max()) == 0.0


def test_in_bf16_the_merged_weights_are_those_of_the_forward_pass(tmp_path: Path) -> None:
    session, data = session_of("qat_lora", "train.precision=bf16", "optim.lr=1e-2")
    train(session, data, 1, 2)
    write_result(session, tmp_path)
    model, _ = merged_and_beside(session.run, tmp_path)
    for name in session.anatomy.linears:
        layer: Any = session.model.get_submodule(name)
        whole = torch.eye(layer.in_features)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            seen = layer(whole).T
        assert torch.equal(seen, model.get_submodule(name).weight), name


def test_dropout_reaches_the_factors_as_loras_does() -> None:
    session, _ = session_of("qat_lora", "method.dropout=0.5")
    layer: Any = session.model.get_submodule(next(iter(session.anatomy.linears))).train()
    torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    x, above = torch.randn(6, layer.in_features), torch.randn(6, layer.out_features)
    session.draws.begin(1, batch_of(6), x.device)
    layer(x).backward(above)
    session.draws.begin(1, batch_of(6), x.device)
    dropped = layer.lora_dropout["default"](x)
    down, up, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    grads = torch.autograd.grad(dropped @ (scale * up @ down).T, [down, up], above)
    for mine, loras in zip((down.grad, up.grad), grads, strict=True):
        assert torch.allclose(mine, loras, rtol=1e-4, atol=1e-5)  # the sum is x's part and the difference's
    assert torch.equal(layer.eval()(x), layer(x))


def test_qat_lora_goes_on_from_an_adapter_of_lora(tmp_path: Path) -> None:
    session, data = session_of("lora", "optim.lr=1e-2")
    train(session, data, 1, 2)
    write_result(session, tmp_path)
    after, _ = session_of("qat_lora", f"method.init_from={tmp_path}")
    mine, other = (dict(part.model.named_parameters()) for part in (after, session))
    assert all(torch.equal(mine[name], value) for name, value in other.items() if "lora_" in name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=qat", "method.scheme=int3"], r"method\.scheme must be .*int8.*int2.*got 'int3'"),
        (
            ["method=qat", "method.group_size=48"],
            r"method\.group_size must divide the inputs of every linear, got 48 and .*q_proj with 128; .* is 32",
        ),
        (["method=qat_lora", "method.group_size=1"], r"method\.group_size must be 2 or more, got 1"),
        (["method=qat", "method.scheme=int2", "method.group_size=64"], r"at most 32 with method\.scheme=int2"),
        (["method=qat", "method.scheme=int2", "method.group_size=20"], r"got 20 .* the nearest that does is 16"),
        (["method=qat", "method.scheme=int8", "method.group_size=32"], r"must be auto with method\.scheme=int8"),
        (["method=qat", "quantization=nf4"], r"quantization=nf4 freezes them"),
        (["method=qat_lora", "quantization=int8"], r"quantization=int8 has rounded the base to another"),
        (["method=qat_lora", "+method.options.use_dora=true"], r"use_dora must be left out with qat_lora"),
        (["method=int8_lora", "quantization=none"], r"method=int8_lora means an 8-bit base, got quantization=none"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        bones_of(*words)
    assert "\n" not in str(error.value)


def test_a_packed_base_is_refused_under_any_name() -> None:
    run = compose(["model=tiny", "launcher=local", "method=qlora"]).run
    model = build_meta(run.model.resolve(), torch.float32)
    anatomy = dissect(model)
    run.quantization.convert(model, anatomy)
    with pytest.raises(ValueError, match=r"quantization must be none where method\.scheme rounds, got model"):
        grid_of("int4", "auto").linears(model, anatomy)


@pytest.mark.parametrize("method", ["qat", "qat_lora"])
def test_without_torchao_the_command_that_installs_it_is_said(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not there
    with pytest.raises(ValueError, match=r"torchao library, which is missing; pip install 'dsft\[qat\]'"):
        bones_of(f"method={method}")


def test_fewer_levels_than_the_base_start_elsewhere() -> None:
    off = []
    base = logits(session_of("full")[0].model)
    for scheme in ("int8", "int4", "int2"):
        off.append(float((logits(session_of("qat", f"method.scheme={scheme}")[0].model) - base).abs().max()))
    assert 0 < off[0] < off[1] < off[2]
