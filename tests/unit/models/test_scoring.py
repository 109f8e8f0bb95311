"""Scores are what cross entropy of whole logits is, in value and in gradient, whatever the head and the block size."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig

from dsft.models import scoring

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "plain": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "soft cap": lambda: Gemma2Config(**SMALL, final_logit_softcapping=3.0),
    "scaled": lambda: GraniteConfig(**SMALL, logits_scaling=7.0),
}
DIRECT = {"plain": True, "tied": True, "soft cap": False, "scaled": False}


def made(name: str) -> tuple[Any, Any]:
    """The same random model twice: as transformers gives it, and scoring."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    ours = copy.deepcopy(model)
    scoring.install(ours, ours.get_output_embeddings())
    assert ours.get_output_embeddings().forward.__self__.direct is DIRECT[name]
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIGS[name]())
    ours.to_empty(device="cpu")
    ours.tie_weights()
    ours.load_state_dict(plain.state_dict())
    for one, other in zip(plain.buffers(), ours.buffers(), strict=True):
        other.copy_(one)
    return plain, ours


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    places = torch.tensor([0, 2, 3, 4, 7, 8, 10])
    return torch.randint(1, 97, (1, 12)), places, torch.randint(1, 97, (len(places),))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("learns", [False, True], ids=["frozen head", "head learns"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_the_cross_entropy_of_whole_logits(
    name: str, precision: torch.dtype, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "AT_ONCE", 3 * 97)  # three rows at a time of seven
    plain, ours = made(name)
    for model in (plain, ours):
        model.get_output_embeddings().weight.requires_grad_(learns)
    tokens, places, targets = batch()
    weights = torch.rand(len(places))  # a gradient of its own for each row
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        logits = plain(input_ids=tokens, logits_to_keep=places, use_cache=False).logits[0]
        expected = F.cross_entropy(logits.float(), targets, reduction="none")
        got = ours(input_ids=tokens, logits_to_keep=places, targets=targets, use_cache=False).logits[0]
    assert got.dtype is torch.float32
    close = {"rtol": 1e-5, "atol": 1e-6} if precision is torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(got, expected, **close)
    one, other = gradients(plain, (expected * weights).sum()), gradients(ours, (got * weights).sum())
    assert one.keys() == other.keys()
    bound = 1e-5 if precision is torch.float32 else 3e-2
    for key in one:
        assert (one[key] - other[key]).norm() <= bound * one[key].norm(), key


@pytest.mark.parametrize("learns", [False, True], ids=["frozen head", "head learns"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_temperature_divides_the_logits_and_entropies_stand_below(
    name: str, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "AT_ONCE", 3 * 97)
    plain, ours = made(name)
    for model in (plain, ours):
        model.get_output_embeddings().weight.requires_grad_(learns)
    tokens, places, targets = batch()
    asked = {"input_ids": tokens, "logits_to_keep": places, "use_cache": False}
    spread = torch.distributions.Categorical(logits=plain(**asked).logits[0] / 0.7)
    got = ours(**asked, targets=targets, temperature=0.7, entropy=True).logits
    torch.testing.assert_close(got, torch.stack([-spread.log_prob(targets), spread.entropy()]))
    weights = torch.rand(len(places))
    one = gradients(plain, -(spread.log_prob(targets) * weights).sum())
    other = gradients(ours, (got[0] * weights).sum())
    assert one.keys() == other.keys()
    for key in one:
        assert (one[key] - other[key]).norm() <= 1e-5 * one[key].norm(), key


def test_without_targets_it_gives_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = made("plain")
    tokens, places, targets = batch()
    ours(input_ids=tokens, logits_to_keep=places, targets=targets)
    torch.testing.assert_close(ours(input_ids=tokens).logits, plain(input_ids=tokens).logits)


def test_no_target_scores_nothing_and_keeps_the_way_to_the_gradient() -> None:
    _, ours = made("plain")
    ours.get_output_embeddings().weight.requires_grad_(False)
    tokens, places, targets = batch()
    got = ours(input_ids=tokens, logits_to_keep=places[:0], targets=targets[:0]).logits
    assert got.shape == (1, 0)
    grads = gradients(ours, got.sum())
    assert all(not bool(grad.any()) for grad in grads.values())
    assert any("q_proj" in name for name in grads)


def test_logits_never_exist_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "AT_ONCE", 2 * 50_000)
    hidden = torch.randn(64, 16, requires_grad=True)
    weight, targets = torch.randn(50_000, 16), torch.randint(50_000, (64,))
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        scoring._Score.apply(hidden, weight, None, targets, (1.0, True)).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 64 * 50_000 * 4 / 8
