"""What the bridge's methods refuse: one line, with the key, what was wrong and a way out."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, OPTConfig, Phi3Config

from dsft.compose import compose
from dsft.engine.assemble import skeleton
from dsft.methods.peft_ia3 import IA3
from dsft.models.anatomy import dissect

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=lora", "method.rank=65"], r"method\.rank must be at most 64, the smaller side of .*k_proj"),
        (["method=pissa", "method.rank=129", "method.target_modules=q_proj"], r"method\.rank must be at most 128"),
        (
            ["method=lora", "+method.options.rank_pattern={k_proj: 65}"],
            r"method\.options\.rank_pattern\.k_proj must be at most 64",
        ),
        (
            ["method=lora", "+method.options.alpha_pattern={k_prj: 8}"],
            r"method\.options\.alpha_pattern: k_prj matches no target, nearest: k_proj, .*; the targets are down_proj",
        ),
        (
            ["method=lora", "+method.options.use_dura=true"],
            r"method\.options may hold .*, got use_dura, nearest",
        ),
        (["method=lora", "+method.options.use_dora=1"], r"method\.options\.use_dora must be true or false, got 1"),
        (
            ["method=lora", "+method.options.rank_pattern={q_proj: 1.5}"],
            r"rank_pattern\.q_proj must be a whole number of 1 or more, got 1\.5",
        ),
        (["method=lora", "method.target_modules=dwn_proj"], r"dwn_proj matches no linear, nearest: down_proj"),
        (
            ["method=ia3", "method.feedforward_modules=[dwn_proj]"],
            r"method.feedforward_modules: dwn_proj matches no li",
        ),
        (["method=lora", "method.target_modules=[]"], r"method\.target_modules must name something"),
        (["method=pissa", "+method.options.use_dora=true"], r"use_dora must be left out with PiSSA"),
        (["method=pissa", "method.iterations=0"], r"method\.iterations must be 1 or more, or null"),
        (["method=lora_plus", "method.lr_ratio=0"], r"method\.lr_ratio must be above 0"),
        (["method=vera", "method.d_initial=0"], r"method\.d_initial must not be 0"),
        (["method=peft", "method.type=peft.LoraConfig"], r"method\.type must not be peft\.LoraConfig: .* method=lora"),
        (
            ["method=peft", "method.type=peft.LohaConfig"],
            r"method\.type must name a configuration class, as peft\.LoHa",
        ),
        (
            ["method=peft", "+method.options.rank_dropout=0.1"],
            r"method\.options\.rank_dropout must be 0 with peft\.LoHaConfig, got 0\.1: PEFT draws it for a whole b",
        ),
        (["method=peft", "method.type=peft.AdaLoraConfig"], r"its ranks are allocated while it trains"),
        (["method=peft", "method.type=peft.PromptTuningConfig"], r"must be an adapter of linears"),
        (
            ["method=peft", "method.type=peft.RandLoraConfig"],
            r"whose layers share nothing, got peft\.RandLora",
        ),
        (
            ["method=peft", "+method.options.alphaa=3"],
            r"method\.options\.alphaa is no key of peft\.LoHaConfig here, nearest",
        ),
        (["method=ia3", "model=tiny_moe"], r"feedforward_modules=auto needs a linear .* experts are one tensor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_says_what_is_wrong(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        _built(words)
    assert "\n" not in str(caught.value)


def _built(words: list[str]) -> None:
    run = compose(["model=tiny", "train.precision=fp32", *words]).run
    skeleton(run, run.model.resolve())


def _attached(config: object) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return IA3(target_modules="auto", feedforward_modules="auto", init_from=None).attach(model, dissect(model))


def test_ia3_finds_keys_values_and_down_projections_by_other_names() -> None:
    model = _attached(OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64))
    found = {name.split(".")[-3] for name, param in model.named_parameters() if param.requires_grad}
    assert found == {"k_proj", "v_proj", "fc2"}


@pytest.mark.parametrize(
    ("config", "leaf"),
    [
        (Phi3Config(**SMALL, intermediate_size=96, pad_token_id=0), "qkv_proj"),
        (GPTNeoXConfig(**SMALL, intermediate_size=96), "query_key_value"),
    ],
)
def test_ia3_refuses_keys_and_values_in_one_linear(config: object, leaf: str) -> None:
    with pytest.raises(ValueError, match=f"got {leaf}, which holds queries, keys and values in one"):
        _attached(config)
