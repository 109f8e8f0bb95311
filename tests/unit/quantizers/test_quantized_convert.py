"""What convert swaps, what it leaves, and that PEFT attaches to the result."""

import pytest
import torch
from torch import nn

from dsft.models.anatomy import dissect
from dsft.protocols import Quantizer
from dsft.quantizers.footprint import footprint
from dsft.quantizers.int8 import Int8
from dsft.quantizers.nf4 import NF4
from dsft.quantizers.none import Unquantized
from dsft.quantizers.packed import ByteLinear

PACKING = {"nf4": NF4(double_quant=True, compute_dtype="auto"), "int8": Int8(compute_dtype="auto")}


def llama(*, device: str = "cpu", tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config)


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with torch.device("meta"):
        return MixtralForCausalLM(config)


@pytest.mark.parametrize("kind", PACKING)
@pytest.mark.parametrize("tied", [True, False])
def test_convert_swaps_the_blocks_and_leaves_head_and_embedding(kind: str, tied: bool) -> None:
    model = llama(device="meta", tied=tied)
    anatomy = dissect(model)
    biases = {name: param for name, param in model.named_parameters() if name.endswith(".bias")}
    assert biases
    assert PACKING[kind].convert(model, anatomy) is model
    for name in anatomy.linears:
        linear = model.get_submodule(name)
        assert isinstance(linear, ByteLinear)
        assert linear.weight.is_meta
        assert linear.weight.shape == (linear.out_features, linear.in_features)
        assert all(linear.get_parameter(part).is_meta for part in linear.matrix.parts)
    assert type(model.get_submodule(anatomy.head)) is nn.Linear
    assert type(model.get_submodule(anatomy.embedding)) is nn.Embedding
    assert all(dict(model.named_parameters())[name] is param for name, param in biases.items())


@pytest.mark.parametrize("kind", PACKING)
def test_converted_model_computes_with_the_unpacked_weights(kind: str) -> None:
    model, twin = llama(), llama()
    PACKING[kind].convert(model, dissect(model))
    for name in dissect(twin).linears:
        twin.get_submodule(name).weight.data = model.get_submodule(name).weight
    tokens = torch.arange(12).reshape(2, 6)
    assert torch.equal(model(tokens).logits, twin(tokens).logits)


def test_none_returns_the_model_as_it_is() -> None:
    model = llama(device="meta")
    names = [(name, type(module)) for name, module in model.named_modules()]
    none = Unquantized()
    assert none.convert(model, dissect(model)) is model
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    assert none.report(model) == ""


def test_a_model_without_linears_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(ValueError, match=r"quantization=nf4 must find an nn.Linear .* choose quantization=none"):
        PACKING["nf4"].convert(model, dissect(model))


def test_report_counts_every_parameter_once() -> None:
    model = llama(device="meta", tied=True)
    total = sum(param.numel() for param in model.parameters())
    linears = sum(model.get_submodule(name).weight.numel() for name in dissect(model).linears)
    PACKING["nf4"].convert(model, dissect(model))
    counted = footprint(model)
    assert counted.packed_parameters == linears
    assert counted.packed_parameters + counted.plain_parameters == total
    assert counted.packed_bytes / linears * 8 == pytest.approx(4.127, abs=0.05)  # short last blocks of small weights


def test_report_names_fused_experts_that_stay_unpacked() -> None:
    model = mixtral()
    PACKING["nf4"].convert(model, dissect(model))
    counted = footprint(model)
    assert counted.expert_parameters == 4 * 3 * 64 * 96
    assert "fused experts stay unpacked" in PACKING["nf4"].report(model)


@pytest.mark.parametrize("kind", PACKING)
@pytest.mark.parametrize("dora", [False, True])
def test_peft_attaches_and_starts_as_the_packed_base(kind: str, dora: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = llama()
    quantizer: Quantizer = PACKING[kind]
    quantizer.convert(model, dissect(model))
    tokens = torch.arange(12).reshape(2, 6)
    base = model(tokens).logits.detach()
    stored = {name: param.clone() for name, param in model.named_parameters() if param.dtype == torch.uint8}
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear", use_dora=dora), model)
    torch.testing.assert_close(model(tokens).logits, base, rtol=1e-5, atol=1e-6)
    learns = [param for name, param in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.SGD(learns, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens).logits.pow(2).mean().backward()
        optimizer.step()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in learns)
    assert not torch.allclose(model(tokens).logits, base)
    kept = {name.replace(".base_layer", ""): param for name, param in model.named_parameters()}
    assert all(torch.equal(kept[name], value) for name, value in stored.items())


@pytest.mark.parametrize("kind", PACKING)
@pytest.mark.parametrize("dora", [False, True])
def test_peft_attaches_on_meta(kind: str, dora: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = llama(device="meta")
    PACKING[kind].convert(model, dissect(model))
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=dora)
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    assert all(param.is_meta for param in model.parameters())
    vectors = [param for name, param in model.named_parameters() if "magnitude" in name]
    assert len(vectors) == (14 if dora else 0)
