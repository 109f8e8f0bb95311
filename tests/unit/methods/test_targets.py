"""What method.target_modules and method.trainable mean on a real anatomy."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dsft.compose import compose
from dsft.methods.freeze import Freeze
from dsft.methods.peft_targets import resolve_targets
from dsft.models.anatomy import dissect
from dsft.protocols import Anatomy


def _bones(model: str) -> tuple[nn.Module, Anatomy]:
    import torch

    from dsft.models.build import build_meta

    meta = build_meta(compose([f"model={model}"]).run.model.resolve(), torch.float32)
    return meta, dissect(meta)


@pytest.mark.parametrize(
    ("wanted", "suffixes"),
    [
        ("all-linear", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        (("mlp", "q_proj"), ["down_proj", "gate_proj", "q_proj", "up_proj"]),
        (r".*\.(q|v)_proj", ["q_proj", "v_proj"]),
    ],
)
def test_targets_become_the_shortest_names(wanted: str | tuple[str, ...], suffixes: list[str]) -> None:
    assert resolve_targets(wanted, *_bones("tiny")) == suffixes


def test_some_blocks_only_keep_their_full_names() -> None:
    found = resolve_targets(r"model\.layers\.0\..*q_proj", *_bones("tiny"))
    assert found == ["model.layers.0.self_attn.q_proj"]


def test_a_word_that_matches_nothing_is_refused_with_the_choice() -> None:
    with pytest.raises(ValueError, match=r"q_prj matches no linear, nearest: q_proj.*; there are: all-linear, atte"):
        resolve_targets("q_prj", *_bones("tiny"))


def test_a_group_that_this_model_does_not_have_is_not_offered() -> None:
    with pytest.raises(ValueError, match=r"mlp matches no linear; there are: all-linear, attention, k_proj"):
        resolve_targets("mlp", *_bones("tiny_moe"))


def test_freeze_takes_blocks_head_norms_and_patterns() -> None:
    model, anatomy = _bones("tiny")
    Freeze(trainable=(1, "head", "*.0.*.q_proj.weight")).attach(model, anatomy)
    learning = {name for name, param in model.named_parameters() if param.requires_grad}
    last = anatomy.blocks[-1]
    assert {name for name in learning if not name.startswith(f"{last}.")} == {
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.weight",
    }


def test_freeze_refuses_more_blocks_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"method\.trainable must be at most"):
        Freeze(trainable=(99,)).attach(*_bones("tiny"))


def _mamba() -> tuple[Any, Anatomy]:
    config = AutoConfig.for_model("mamba", vocab_size=260, hidden_size=64, num_hidden_layers=2, state_size=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, dissect(model)


def test_all_linear_leaves_out_what_peft_refuses_and_says_so() -> None:
    model, anatomy = _mamba()
    lora = compose(["model=tiny", "method=lora", "method.rank=4", "train.steps=1"]).run.method
    learning = {name for name, param in lora.attach(model, anatomy).named_parameters() if param.requires_grad}
    adapted = {name.partition(".lora_")[0] for name in learning}
    assert adapted == {name for name in anatomy.linears if not name.endswith("out_proj")}
    said = "all-linear leaves out model.layers.0.mixer.out_proj and 1 more: PEFT refuses them in a mamba model"
    assert list(lora.notes(model, anatomy)) == [said.replace("model.layers", anatomy.blocks[0].rpartition(".")[0])]


@pytest.mark.parametrize("words", ["[out_proj,in_proj]", "out_proj"])
def test_a_linear_that_peft_refuses_is_refused_by_its_name(words: str) -> None:
    lora = compose(["model=tiny", "method=lora", f"method.target_modules={words}", "train.steps=1"]).run.method
    with pytest.raises(
        ValueError, match=r"^method\.target_modules must not name \S+out_proj: PEFT refuses it in a mamba"
    ):
        lora.attach(*_mamba())
