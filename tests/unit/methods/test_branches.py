"""Where an adapter goes in models of many families, and what it computes there."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from dsft.compose import compose
from dsft.methods.branches import branch_end, feed_forward, norms
from dsft.models.anatomy import dissect
from dsft.protocols import Anatomy, Method

SIZES = {"vocab_size": 100, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {},
    "qwen3": {"head_dim": 16, "num_key_value_heads": 2},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}
ENDS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj", "mlp"),
    "phi3": ("self_attn.o_proj", "mlp.down_proj", "mlp"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj", "mlp"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h", "mlp"),
    "opt": ("self_attn.out_proj", "fc2", None),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h", "mlp"),
    "mixtral": ("self_attn.o_proj", "mlp", "mlp"),
    "qwen2_moe": ("self_attn.o_proj", "mlp", "mlp"),
}


@cache
def _method(*words: str) -> Method:
    return compose(["model=tiny", *words]).run.method


def _model(family: str, device: str = "cpu") -> tuple[Any, Anatomy]:
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 128, **FAMILIES[family]}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    return model, dissect(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_ends_where_the_family_ends_it(family: str) -> None:
    model, anatomy = _model(family, "meta")
    block = anatomy.blocks[-1]
    attention, mlp, whole = ENDS[family]
    assert branch_end(model, anatomy, block, "attention") == f"{block}.{attention}"
    assert branch_end(model, anatomy, block, "mlp") == f"{block}.{mlp}"
    if whole is None:
        with pytest.raises(ValueError, match=r"blocks whose MLP is one module, got none"):
            feed_forward(model, anatomy, block)
    else:
        assert feed_forward(model, anatomy, block) == f"{block}.{whole}"


def test_norms_are_those_of_the_blocks_and_the_final_one() -> None:
    assert len(norms(*_model("llama", "meta"))) == 2 * 2 + 1
    assert len(norms(*_model("qwen3", "meta"))) == 4 * 2 + 1  # queries and keys have one each
    assert len(norms(*_model("bloom", "meta"))) == 2 * 2 + 1  # the embedding's is not one of them
    assert len(norms(*_model("opt", "meta"))) == 2 * 2 + 1  # defined before the blocks, and last in use


def test_a_model_without_linears_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=64, n_head=4))
    with pytest.raises(ValueError, match=r"whose attention ends in an nn.Linear of the model's width, 64"):
        _method("method=houlsby").attach(model, dissect(model))


TOKENS = torch.arange(24).view(1, 24) % 90


def _grown(family: str, *words: str) -> tuple[nn.Module, torch.Tensor]:
    """The model with the method in it, its learned values away from their start, and the base's logits before."""
    model, anatomy = _model(family)
    base = model(TOKENS).logits.detach()
    model = _method(*words).attach(model, anatomy)
    started = model(TOKENS).logits.detach()
    assert torch.equal(started, base)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.1 * torch.randn_like(param))
    return model, base


@pytest.mark.parametrize("method", ["bitfit", "ssf", "houlsby", "pfeiffer", "parallel_adapter", "compacter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_off_meta_a_method_starts_as_the_base_and_then_changes_it(family: str, method: str) -> None:
    if (family, method) == ("opt", "parallel_adapter"):
        return
    model, base = _grown(family, f"method={method}")
    assert (model(TOKENS).logits - base).abs().max() > 1e-3


def _seen(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a grown module gives, and what its own class gives."""
    return module(x), module.plain.forward(module, x)


def test_houlsby_and_parallel_adapters_compute_what_the_papers_write() -> None:
    model, _ = _grown("llama", "method=houlsby", "method.activation=relu")
    module, x = model.model.layers[1].mlp.down_proj, torch.randn(2, 5, 128)
    got, own = _seen(module, x)
    down, up = module.adapter.down, module.adapter.up
    torch.testing.assert_close(got, own + torch.relu(own @ down.weight.T + down.bias) @ up.weight.T + up.bias)
    model, _ = _grown("llama", "method=parallel_adapter", "method.scale=2.5")
    module, x = model.model.layers[1].mlp, torch.randn(2, 5, 64)
    got, own = _seen(module, x)
    down, up = module.adapter.down, module.adapter.up
    torch.testing.assert_close(got, own + 2.5 * (torch.relu(x @ down.weight.T + down.bias) @ up.weight.T + up.bias))


def test_a_phm_layer_is_a_sum_of_kronecker_products() -> None:
    model, _ = _grown("llama", "method=compacter", "method.reduction_factor=8")
    layer = model.model.layers[0].mlp.down_proj.adapter.down
    model(TOKENS)  # hands the factors out as they are now
    a, s, t = model.phm.matrices, layer.s, layer.t
    expected = sum(torch.kron(a[i], torch.outer(s[i], t[i])) for i in range(4))
    torch.testing.assert_close(layer.weight(), expected)
    assert layer.weight().shape == (64, 8)
    assert layer.shared[0] is model.model.layers[1].self_attn.o_proj.adapter.up.shared[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_shared_factors_get_the_same_gradient_when_two_passes_wait_for_backward(reentrant: bool) -> None:
    model, _ = _grown("llama", "method=compacter")
    factors = model.phm.matrices

    def gradient(passes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        factors.grad = None
        sum(model(tokens).logits.pow(2).sum() for tokens in passes).backward()
        return factors.grad.clone()

    model.train()
    passes = (TOKENS, TOKENS.flip(1))
    plain = gradient(passes)
    assert plain.norm() > 0
    for block in model.model.layers:
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=reentrant)
    torch.testing.assert_close(gradient(passes), plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_ssf_scales_and_shifts_and_its_papers_start_is_not_the_base() -> None:
    model, _ = _grown("llama", "method=ssf")
    module, x = model.model.layers[0].input_layernorm, torch.randn(3, 64)
    got, own = _seen(module, x)
    torch.testing.assert_close(got, own * (1 + module.ssf_scale) + module.ssf_shift)
    assert module(x.bfloat16()).dtype == module.plain.forward(module, x.bfloat16()).dtype == torch.float32
    paper, anatomy = _model("llama")
    paper = _method("method=ssf", "method.start=paper").attach(paper, anatomy)
    drawn = torch.cat([param.detach().flatten() for param in paper.parameters() if param.requires_grad])
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.05)
    assert abs(float(drawn.mean())) < 1e-3


@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_biases_of_norms_learn_in_fp32_beside_a_base_in_bf16(family: str) -> None:
    model, anatomy = _model(family)
    model.to(torch.bfloat16)
    _method("method=bitfit").attach(model, anatomy)
    for param in model.parameters():
        param.data = param.data.float() if param.requires_grad else param.data
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(8)[None]).logits.sum().backward()
    learned = {name: param for name, param in model.named_parameters() if param.requires_grad and "norm" in name}
    assert len(learned) == 2 * 2 + 1
    assert all(param.grad is not None and param.grad.dtype == torch.float32 for param in learned.values())
    assert {type(model.get_submodule(name.removesuffix(".bias"))).__base__ for name in learned} == {nn.LayerNorm}
