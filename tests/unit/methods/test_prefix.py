"""Prefix tuning: what real tokens would have left, the papers' counts, PEFT's file, generation, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from dsft.methods.prefix import Prefix
from dsft.models.anatomy import dissect
from dsft.models.attention import CACHED, NAME, register
from dsft.models.build import build_meta
from dsft.models.files import ModelFiles
from dsft.protocols import PREFIX

NUMBERS = {
    "vocab_size": 260, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
    "intermediate_size": 96, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": NUMBERS,
    "qwen3": {**NUMBERS, "head_dim": 32},
    "mixtral": {**NUMBERS, "num_local_experts": 4, "sliding_window": None},
    "mistral": {**NUMBERS, "sliding_window": 9},
    "gpt2": {"vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": None},
}
LENGTHS = (5, 37, 1, 20)
P = 7
PLAIN = Prefix(num_virtual_tokens=P, projection=None, init_from=None)
ROUNDING = 1e-5
"""Of logits of order 1: other kernels, other orders of sums, fp32."""


def _model(family: str, attention: str = "sdpa") -> Any:
    register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, initializer_range=0.1, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def _attached(family: str, method: Prefix = PLAIN) -> Any:
    """The same weights with a prefix of random values."""
    model = method.attach(_model(family, NAME), dissect(_model(family)))
    for name, param in list(model.named_parameters()):
        if param.is_meta:
            value = method.initial(model, name, param, lambda name: torch.zeros(()))
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, nn.Parameter(value))
    return model


def _tokens(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 260, (length,), generator=generator) for length in lengths]


def _logits(model: Any, rows: list[Tensor]) -> list[Tensor]:
    """Packed in one row; logits of each example."""
    lengths = tuple(len(row) for row in rows)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    out = model(input_ids=torch.cat(rows)[None], position_ids=positions, segment_lengths=lengths, use_cache=False)
    return list(out.logits[0].split(lengths))


def _fill(model: Any, cache: DynamicCache) -> None:
    """Make the prefix what real tokens left in the cache of the base."""
    found = [module for name, module in model.named_modules() if name.endswith(PREFIX)]
    for module, layer in zip(found, cache.layers, strict=True):
        pairs = torch.stack([layer.keys[0], layer.values[0]])  # (2, G, P, D)
        module.pairs.data = pairs.permute(2, 0, 1, 3).reshape(P, -1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prefix_set_to_the_cache_of_real_tokens_is_the_base_on_those_tokens(family: str) -> None:
    base, model = _model(family), _attached(family)
    first, *rows = _tokens(P, *LENGTHS)
    cache = DynamicCache()
    base(input_ids=first[None], past_key_values=cache, use_cache=True)
    _fill(model, cache)
    for row, ours in zip(rows, _logits(model, rows), strict=True):
        theirs = base(input_ids=torch.cat([first, row])[None], use_cache=False).logits[0, P:]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_generates_what_the_base_does_after_those_tokens(family: str) -> None:
    base, model = _model(family), _attached(family)
    first, *rows = _tokens(P, 11, 4, 8)
    cache = DynamicCache()
    base(input_ids=first[None], past_key_values=cache, use_cache=True)
    _fill(model, cache)
    model.set_attn_implementation(CACHED)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    width = max(map(len, rows))
    padded = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    ours = model.generate(input_ids=padded, attention_mask=mask, use_cache=True, **options)[:, width:]
    for row, made in zip(rows, ours, strict=True):
        prompt = torch.cat([first, row])[None]
        theirs = base.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)[0, P + len(row) :]
        assert made.tolist() == theirs.tolist()
        alone = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row)[None], **options)[0]
        assert alone[len(row) :].tolist() == made.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("projection", [None, 16])
def test_packed_examples_each_get_the_prefix_and_its_gradient(family: str, projection: int | None) -> None:
    model = _attached(family, Prefix(num_virtual_tokens=P, projection=projection, init_from=None))
    rows = _tokens(*LENGTHS)
    with torch.no_grad():
        packed, apart = _logits(model, rows), [_logits(model, [row])[0] for row in rows]
    for one, other in zip(packed, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=ROUNDING)
    sum(logits.square().sum() for logits in _logits(model, rows)).backward()  # type: ignore[union-attr]
    together = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    model.zero_grad()
    for row in rows:
        _logits(model, [row])[0].square().sum().backward()
    for name, grad in together.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("projection", [None, 16])
@torch.no_grad()
def test_peft_loads_the_file_to_the_same_logits(family: str, projection: int | None, tmp_path: Path) -> None:
    from peft import PeftModel

    method = Prefix(num_virtual_tokens=P, projection=projection, init_from=None)
    model = _attached(family, method)
    weights = {name: param for name, param in model.named_parameters() if param.requires_grad}
    written = method.save(model, weights, tmp_path, "somewhere")
    assert written["prompt_embeddings"].shape[0] == P
    (row,) = _tokens(30)
    peft = PeftModel.from_pretrained(_model(family), tmp_path).eval()
    torch.testing.assert_close(peft(input_ids=row[None]).logits[0], _logits(model, [row])[0], rtol=0, atol=ROUNDING)


def _count(family: str, method: Prefix, **numbers: int) -> int:
    config = AutoConfig.for_model(family, **numbers)
    files = ModelFiles(
        config=config, folder=None, name_or_path=family, init="random", revision=None, trust_remote_code=False
    )
    meta = build_meta(files, torch.float32)
    model = method.attach(meta, dissect(meta))
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


@pytest.mark.parametrize(
    ("width", "layers", "heads", "length", "published"),
    [(1024, 24, 16, 5, 245_760), (1280, 36, 20, 20, 1_843_200)],  # GPT-2 medium: 250K, 0.1 % (Li & Liang 2021); large
)
def test_counts_are_those_of_the_paper(width: int, layers: int, heads: int, length: int, published: int) -> None:
    method = Prefix(num_virtual_tokens=length, projection=None, init_from=None)
    assert _count("gpt2", method, n_embd=width, n_layer=layers, n_head=heads) == published


def test_the_network_and_grouped_heads_count_as_their_formula_says() -> None:
    length, h, d, layers, pair = 10, 32, 64, 2, 2 * 2 * 16  # two key-value heads of 16
    numbers = {key: value for key, value in NUMBERS.items() if value is not None}
    assert (
        _count("llama", Prefix(num_virtual_tokens=length, projection=None, init_from=None), **numbers)
        == layers * length * pair
    )
    network = length * d + d * h + h + h * layers * pair + layers * pair
    assert _count("llama", Prefix(num_virtual_tokens=length, projection=h, init_from=None), **numbers) == network


@torch.no_grad()
def test_a_layers_prefix_changes_no_layer_before_it() -> None:
    model = _attached("llama")
    (row,) = _tokens(20)
    seen: list[Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    _logits(model, [row])
    model.model.layers[1].self_attn.get_submodule(PREFIX).pairs.data.zero_()
    _logits(model, [row])
    assert torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[1], seen[3])


def test_an_attention_that_would_leave_the_prefix_out_is_refused() -> None:
    model = _attached("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="sdpa attention would leave the prefix out"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize(("length", "projection", "message"), [(0, None, "num_virtual_tokens"), (1, 0, "projection")])
def test_values_out_of_range_are_refused(length: int, projection: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=rf"method\.{message} must be 1 or more, got 0"):
        Prefix(num_virtual_tokens=length, projection=projection, init_from=None)


def test_a_model_without_keys_and_values_of_its_heads_is_refused() -> None:
    model = _model("llama", NAME)
    model.model.layers[1].self_attn.v_proj = nn.Linear(64, 48)
    with pytest.raises(ValueError, match=r"model must have keys and values of 2 heads to hold a prefix"):
        PLAIN.attach(model, dissect(model))
    del model.model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"model must have one attention in each block"):
        PLAIN.attach(model, dissect(model))
