"""Numbers of model.config: those that transformers cannot build or run are one line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml

from dsft.models.build import build_meta
from dsft.models.numbers import config_of
from dsft.wording import OWN_CONF

SHAPES = {path.stem: yaml.safe_load(path.read_text())["config"] for path in (OWN_CONF / "model").glob("*.yaml")
          if "config:" in path.read_text() and path.stem != "custom"}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_ours_is_taken(name: str) -> None:
    assert config_of(SHAPES[name]).model_type == SHAPES[name]["model_type"]


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"hidden_size": 63}, "not a multiple"),
        ({"hidden_size": "abc"}, "abc"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads=4, got 3"),
        ({"intermediate_size": 0}, r"every size must be 1 or more, got \S+gate_proj.weight of shape \(0, 128\)"),
        ({**SHAPES["tiny_moe"], "num_experts_per_tok": 9}, "num_experts_per_tok must be from 1 to num_local_experts=4"),
        ({**SHAPES["tiny_moe"], "num_experts_per_tok": 0}, "num_experts_per_tok must be from 1 to num_local_experts=4"),
        ({**SHAPES["tiny_moe"], "num_local_experts": 0}, "every size must be 1 or more"),
        ({"vocab_size": 10}, "Padding_idx"),
        ({"model_type": "gpt3"}, "got 'gpt3'; did you mean gptj?"),
        ({"model_type": ""}, "got ''; such as llama"),
        ({"model_type": "t5"}, "got 't5'; such as llama"),
    ],
)
def test_numbers_of_which_there_is_no_model_are_one_line(
    numbers: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        config_of({**SHAPES["tiny"], **numbers})
    assert str(caught.value).startswith("model.config")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads=4, got 3"),
        ({"intermediate_size": 0}, "every size must be 1 or more"),
        ({"sliding_window": 0}, "sliding_window must be 1 or more, or null, got 0; correct it"),
        ({"hidden_act": "nonsense"}, "hidden_act='nonsense' is unknown to its class; correct its config.json"),
    ],
)
def test_a_folder_of_such_numbers_is_refused_when_the_model_is_built(
    changed: dict[str, Any], reason: str, shape: Callable
) -> None:
    with pytest.raises(ValueError, match=f"^model llama must (be a causal|have numbers) .*: .*{reason}") as caught:
        build_meta(shape("llama", **changed), torch.float32)
    assert "\n" not in str(caught.value)
