"""Packed attention of families with caps, sinks, windows, chunks and long rope, against their own eager attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dsft.models.attention import CACHED
from dsft.models.files import ModelFiles
from dsft.models.spans import SPAN, Span

NUMBERS: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
TURNS = ["sliding_attention", "full_attention"]
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 24,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "llama4_text": {
        "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1,
        "attention_chunk_size": 12, "moe_layers": [1], "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "qwen2_moe": {
        **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32, "use_sliding_window": True,
        "sliding_window": 9, "max_window_layers": 1, "layer_types": TURNS,
    },
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": 24},
}  # fmt: skip
SPANS = {
    "gemma2": [Span(window=8), Span()],
    "gpt_oss": [Span(window=8), Span()],
    "llama4_text": [Span(chunk=12), Span()],
    "qwen2_moe": [Span(window=9), Span()],
    "phi3": [Span(), Span()],
}
LENGTHS = (5, 40, 1, 24, 29)
"""Short of and beyond windows, chunks and the original length of the rope."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, load: Callable) -> tuple[str, Any, Any]:
    """Its name; a small model of it as dsft runs it; the same one as transformers runs it, attention eager."""
    config = AutoConfig.for_model(request.param, **{**NUMBERS, **FAMILIES[request.param]})
    files = ModelFiles(
        config=config, folder=None, name_or_path=request.param, init="random", revision=None, trust_remote_code=False
    )
    ours: Any = load(files)
    with torch.no_grad():
        for name, param in ours.named_parameters():
            if name.endswith("sinks"):
                param.copy_(torch.linspace(-1, 3, len(param)))
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    theirs.load_state_dict(ours.state_dict())
    return request.param, ours, theirs


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 260, (length,), generator=generator) for length in LENGTHS]


def measured(model: Any, calls: list[list[Tensor]], *, packs: bool) -> Tensor:
    """(2,): the loss of all rows, some in each call of a model, and the norm of its gradient; packs: as dsft calls."""
    model.zero_grad()
    loss = torch.zeros(())
    for some in calls:
        positions = torch.cat([torch.arange(len(row)) for row in some])[None]
        known = {"position_ids": positions, "segment_lengths": tuple(map(len, some))} if packs else {}
        logits = model(input_ids=torch.cat(some)[None], use_cache=False, **known).logits[0]
        loss = loss + F.cross_entropy(logits, torch.cat([row.roll(-1) for row in some]), reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    grads = [param.grad.square().sum() for param in model.parameters() if param.grad is not None]
    return torch.stack([loss.detach(), torch.stack(grads).sum().sqrt()])


def spans(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if SPAN in vars(module)]


def test_packed_and_alone_equal_the_familys_own_attention(family: tuple[str, Any, Any]) -> None:
    name, ours, theirs = family
    assert [vars(module)[SPAN] for module in spans(ours)] == SPANS[name]
    one_by_one = [[row] for row in rows()]
    expected = measured(theirs, one_by_one, packs=False)
    torch.testing.assert_close(measured(ours, [rows()], packs=True), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(measured(ours, one_by_one, packs=True), expected, rtol=1e-5, atol=0)


def planted(name: str, model: Any, patch: pytest.MonkeyPatch) -> None:
    """Take away what the family has: its cap, its sinks, its window or chunk, its rope of each example's own length."""
    for module in spans(model):
        if name == "gemma2":
            patch.setattr(module, "attn_logit_softcapping", None)
        elif name == "gpt_oss":
            patch.setitem(module._parameters, "sinks", None)
        elif name == "phi3":
            patch.delitem(vars(model.model.rotary_emb), "forward", raising=False)
        else:
            patch.setattr(module, SPAN, Span())


def test_a_planted_fault_is_seen(family: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name, ours, theirs = family
    expected = measured(theirs, [[row] for row in rows()], packs=False)
    planted(name, ours, monkeypatch)
    assert (measured(ours, [rows()], packs=True) / expected - 1).abs().max() > 1e-3


def test_generation_equals_the_familys_own(family: tuple[str, Any, Any]) -> None:
    """Two prompts, one padded, beyond window and chunk."""
    _, ours, theirs = family
    lengths = (9, 14)
    tokens = torch.zeros(2, 14, dtype=torch.long)
    for index, length in enumerate(lengths):
        tokens[index, 14 - length :] = rows()[3][:length]
    mask = (torch.arange(14)[None] >= 14 - torch.tensor(lengths)[:, None]).long()
    options: dict[str, Any] = {
        "input_ids": tokens, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
        "use_cache": True, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None,
    }  # fmt: skip
    before = ours.config._attn_implementation
    ours.set_attn_implementation(CACHED)
    got, expected = (torch.stack(model.eval().generate(**options).logits) for model in (ours, theirs))
    ours.set_attn_implementation(before)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # logits of order 1
