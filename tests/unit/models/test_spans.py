"""What is read off mask functions, and off models whose attention cannot be held."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from dsft.models.build import build_meta
from dsft.models.files import ModelFiles
from dsft.models.rope import lengths
from dsft.models.spans import SPAN, UNRECORDED, Span, UnheldError, configured, read_off

NUMBERS: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "pad_token_id": 0,
}  # fmt: skip
NONE = torch.zeros(1, dtype=torch.long)


def built(kind: str, **changed: Any) -> Any:
    config = AutoConfig.for_model(kind, **{**NUMBERS, **changed})
    files = ModelFiles(
        config=config, folder=None, name_or_path=kind, init="random", revision=None, trust_remote_code=False
    )
    return build_meta(files, torch.float32)


@pytest.mark.parametrize("reach", [2, 50, 500])
@pytest.mark.parametrize(
    ("function", "span"),
    [
        (causal_mask_function, Span()),
        (sliding_window_causal_mask_function(1), Span(window=1)),
        (sliding_window_causal_mask_function(33), Span(window=33)),
        (chunked_causal_mask_function(33, NONE), Span(chunk=33)),
        (and_masks(causal_mask_function, lambda b, h, q, k: k > q - 7), Span(window=7)),
    ],
)
def test_a_mask_function_is_read_off(function: Any, span: Span, reach: int) -> None:
    places = torch.arange(reach)
    found = read_off(function, reach, "Model")
    assert torch.equal(found.sees(places[:, None], places), span.sees(places[:, None], places))
    assert found == span or max(span.window or 0, span.chunk or 0) >= reach


def _sinks(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
    return key < 4


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (or_masks(causal_mask_function, _sinks), "shows tokens what follows them"),
        (or_masks(sliding_window_causal_mask_function(33), and_masks(_sinks, causal_mask_function)), "is neither"),
        (and_masks(chunked_causal_mask_function(32, NONE), sliding_window_causal_mask_function(8)), "is neither"),
        (lambda b, h, q, k: torch.zeros(8, dtype=torch.long)[k] == q, "depends on more: IndexError"),
    ],
)
def test_another_mask_is_refused(function: Any, reason: str) -> None:
    with pytest.raises(UnheldError, match=rf"got Model, whose mask .*{reason}"):
        read_off(function, 4096, "Model")


@pytest.mark.parametrize(
    ("kind", "changed", "reason"),
    [
        ("stablelm", {}, "StableLmAttention, which gets no segment_lengths"),
        ("doge", {}, "DogeForCausalLM, which changes its masks in a layer"),
        ("bloom", {}, "got BloomForCausalLM, which does not: its examples cannot share a row"),
        ("falcon", {}, "got falcon, which does not: its examples cannot share a row"),
    ],
)
def test_a_model_that_cannot_be_packed_is_refused_before_it_has_weights(
    kind: str, changed: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnheldError, match=reason) as error:
        built(kind, **changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["mistral", "cohere2", "olmo3", "gemma3_text"])
def test_windows_by_argument_are_those_of_the_masks(kind: str) -> None:
    model = built(kind, sliding_window=16)
    assert getattr(model, UNRECORDED) == ""
    types = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 2
    found = [vars(module)[SPAN] for module in model.modules() if SPAN in vars(module)]
    assert found == [Span(window=16 if kind == "sliding_attention" else None) for kind in types]


def test_a_model_that_cannot_be_recorded_says_so() -> None:
    model = built("jetmoe", num_local_experts=2, kv_channels=8)
    assert "meta tensor" in getattr(model, UNRECORDED)
    spans = {vars(module)[SPAN] for module in model.modules() if SPAN in vars(module)}
    assert spans == {Span(recorded=False)}


def test_a_configuration_is_asked_where_no_mask_is_known() -> None:
    types = ["full_attention", "sliding_attention"]
    turns = AutoConfig.for_model("gemma2", **{**NUMBERS, "sliding_window": 5, "layer_types": types})
    assert configured(turns, 0) == Span(recorded=False)
    assert configured(turns, 1) == Span(5, recorded=False)


def test_each_token_knows_the_length_of_its_example() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4, 5]])
    assert lengths(positions).tolist() == [[3, 3, 3, 1, 2, 2, 2, 2], [1, 1, 6, 6, 6, 6, 6, 6]]
    assert lengths(positions[:1, 3:] + 4).tolist() == [[5, 6, 6, 6, 6]]
