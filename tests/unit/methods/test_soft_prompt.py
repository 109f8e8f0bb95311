"""Soft prompts: embeddings of real tokens are those tokens, the papers' counts, PEFT's file, generation, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptEncoder, PromptEncoderConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dsft.compose import compose
from dsft.engine.assemble import skeleton
from dsft.engine.saved import count_saved
from dsft.methods.p_tuning import PTuning, encode
from dsft.methods.prompt import Prompt
from dsft.methods.soft_prompt import NAME as PROMPT
from dsft.methods.soft_prompt import SoftPrompt
from dsft.models.anatomy import dissect
from dsft.models.attention import CACHED, NAME, register
from dsft.models.build import build_meta
from dsft.models.files import ModelFiles

NUMBERS = {
    "vocab_size": 260, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
    "intermediate_size": 96, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": NUMBERS,
    "qwen3": {**NUMBERS, "head_dim": 32},
    "mixtral": {**NUMBERS, "num_local_experts": 4, "sliding_window": None},
    "mistral": {**NUMBERS, "sliding_window": 9},
    "gemma": {**NUMBERS, "head_dim": 16},  # embeddings are scaled by 8
    "gemma3_text": {
        **NUMBERS, "head_dim": 16, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {"vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": None, "eos_token_id": None},
    "bert": {**NUMBERS, "is_decoder": True},  # what takes embedded tokens is not what runs the blocks
}  # fmt: skip
LENGTHS = (5, 37, 1, 20)
P = 7
METHODS: dict[str, SoftPrompt] = {
    "prompt": Prompt(num_virtual_tokens=P, init_text=None, init_from=None),
    "p_tuning": PTuning(num_virtual_tokens=P, encoder_hidden_size=None, encoder_num_layers=2),
}
ROUNDING = 1e-5
"""Of logits of order 1: other kernels, other orders of sums, fp32."""


def _model(family: str, attention: str = "sdpa") -> Any:
    register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, initializer_range=0.1, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def _attached(family: str, method: SoftPrompt = METHODS["prompt"]) -> Any:
    """The same weights with a prompt of its first values."""
    model = method.attach(_model(family, NAME), dissect(_model(family)))
    for name, param in list(model.named_parameters()):
        if param.is_meta:
            value = method.initial(model, name, param, lambda name: model.get_submodule(name).weight.detach())
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, nn.Parameter(value))
    return model


def _rows(model: Any) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(PROMPT))


def _set_to(model: Any, tokens: Tensor) -> None:
    """Make the prompt the embeddings of real tokens, as the model itself embeds them."""
    with torch.no_grad():
        _rows(model).table.data = model.get_input_embeddings()(tokens).clone()


def _tokens(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 260, (length,), generator=generator) for length in lengths]


def _logits(model: Any, rows: list[Tensor]) -> list[Tensor]:
    """Packed in one row; logits of each example."""
    lengths = tuple(len(row) for row in rows)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    out = model(input_ids=torch.cat(rows)[None], position_ids=positions, segment_lengths=lengths, use_cache=False)
    return list(out.logits[0].split(lengths))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prompt_set_to_embeddings_of_real_tokens_is_the_base_on_those_tokens(family: str) -> None:
    base, model = _model(family), _attached(family)
    first, *rows = _tokens(P, *LENGTHS)
    _set_to(model, first)
    for row, ours in zip(rows, _logits(model, rows), strict=True):
        theirs = base(input_ids=torch.cat([first, row])[None], use_cache=False).logits[0, P:]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_generates_what_the_base_does_after_those_tokens(family: str) -> None:
    base, model = _model(family), _attached(family)
    first, *rows = _tokens(P, 11, 4, 8)
    _set_to(model, first)
    model.set_attn_implementation(CACHED)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    width = max(map(len, rows))
    padded = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    ours = model.generate(input_ids=padded, attention_mask=mask, use_cache=True, **options)[:, width:]
    again = model.generate(input_ids=padded, attention_mask=mask, use_cache=False, **options)[:, width:]
    assert again.tolist() == ours.tolist()
    for row, made in zip(rows, ours, strict=True):
        prompt = torch.cat([first, row])[None]
        theirs = base.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)[0, P + len(row) :]
        assert made.tolist() == theirs.tolist()
        alone = model.generate(input_ids=row[None], **options)[0]
        assert alone[len(row) :].tolist() == made.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_packed_examples_each_get_the_prompt_and_its_gradient(family: str, method: str) -> None:
    model = _attached(family, METHODS[method])
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
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_peft_loads_the_file_to_the_same_logits(family: str, method: str, tmp_path: Path) -> None:
    model = _attached(family, METHODS[method])
    weights = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}
    written = METHODS[method].save(model, weights, tmp_path, "somewhere")
    assert torch.equal(written["prompt_embeddings"], _rows(model).rows())  # folding changes no bit
    (row,) = _tokens(30)
    peft = PeftModel.from_pretrained(_model(family), tmp_path).eval()
    theirs = peft(input_ids=row[None]).logits[0, P:]  # PEFT gives the prompt's own, too
    torch.testing.assert_close(theirs, _logits(model, [row])[0], rtol=0, atol=ROUNDING)


def _pefts_encoder(length: int, width: int, hidden: int) -> PromptEncoder:
    torch.manual_seed(3)
    numbers = {"num_transformer_submodules": 1, "encoder_reparameterization_type": "LSTM"}
    return PromptEncoder(
        PromptEncoderConfig(num_virtual_tokens=length, token_dim=width, encoder_hidden_size=hidden, **numbers)
    )


def test_the_encoder_computes_what_pefts_does_in_value_and_gradient() -> None:
    theirs = _pefts_encoder(P, 32, 16)
    ends = {"mlp_head.0": "hidden", "mlp_head.2": "out"}
    names = {
        name: name.removeprefix("lstm_head.").replace("embedding.weight", "embedding") for name in theirs.state_dict()
    }
    for name in names:
        owner, _, kind = name.rpartition(".")
        names[name] = f"{ends[owner]}_{kind}" if owner in ends else names[name]
    weights = {names[name]: value.clone().requires_grad_() for name, value in theirs.state_dict().items()}
    ours, expected = encode(weights), theirs(torch.arange(P)[None])[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for name, param in theirs.named_parameters():
        torch.testing.assert_close(weights[names[name]].grad, param.grad, rtol=1e-4, atol=1e-7)


def _count(family: str, method: SoftPrompt, **numbers: int) -> int:
    config = AutoConfig.for_model(family, **numbers)
    files = ModelFiles(
        config=config, folder=None, name_or_path=family, init="random", revision=None, trust_remote_code=False
    )
    meta = build_meta(files, torch.float32)
    model = method.attach(meta, dissect(meta))
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


@pytest.mark.parametrize(("length", "published"), [(5, 20_480), (100, 409_600)])  # T5-XXL (Lester et al. 2021)
def test_prompt_tuning_counts_as_published(length: int, published: int) -> None:
    numbers = {"hidden_size": 4096, "num_hidden_layers": 1, "intermediate_size": 64}
    assert _count("llama", Prompt(num_virtual_tokens=length, init_text=None, init_from=None), **numbers) == published


def test_p_tuning_counts_as_the_papers_code_and_as_peft() -> None:
    paper = PTuning(num_virtual_tokens=9, encoder_hidden_size=None, encoder_num_layers=2)
    assert _count("gpt2", paper, n_embd=768, n_layer=1, n_head=12) == 8_278_272
    toy = PTuning(num_virtual_tokens=5, encoder_hidden_size=16, encoder_num_layers=2)
    theirs = sum(param.numel() for param in _pefts_encoder(5, 32, 16).parameters())
    assert _count("gpt2", toy, n_embd=32, n_layer=1, n_head=4) == theirs == 15_072


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_rows_start_as_the_texts_tokens_repeated_or_cut_and_else_as_rows_of_the_vocabulary(family: str) -> None:
    for length, expected in ((5, [65, 66, 67, 65, 66]), (2, [65, 66])):
        method = Prompt(num_virtual_tokens=length, init_text="ABC", init_from=None)
        model = method.attach(_model(family, NAME), dissect(_model(family)))
        method.tokenize(model, lambda text: {"input_ids": list(text.encode())})
        rows = _rows(model)
        embedding = model.get_input_embeddings()
        made = method.initial(model, f"model.{PROMPT}.table", rows.table, {"model.embed_tokens": embedding.weight}.get)
        assert torch.equal(made, embedding(torch.tensor(expected)))
    model = _attached(family)
    vocabulary = model.get_input_embeddings()(torch.arange(260))
    assert all((row == vocabulary).all(1).any() for row in _rows(model).table)


def test_a_text_reaches_the_rows_of_a_run() -> None:
    from tests.contract.sessions import session_of

    session, _ = session_of("prompt", "method.init_text='Solve it:'", "method.num_virtual_tokens=4")
    tokens = torch.tensor(session.tokenizer("Solve it:")["input_ids"][:4])
    assert torch.equal(_rows(session.model).table.data, session.model.get_input_embeddings()(tokens))


@pytest.mark.parametrize("method", METHODS)
def test_what_a_step_keeps_of_the_virtual_tokens_is_counted(method: str) -> None:
    run = compose(["model=tiny", f"method={method}", "method.num_virtual_tokens=10", "train.precision=fp32"]).run
    bones = skeleton(run, run.model.resolve())
    kept = count_saved(bones.model, bones.anatomy, (30, 20), bf16=False)
    assert kept is not None
    assert kept.inputs[0] == 4 * (40 + 30) * bones.model.config.hidden_size


def test_scores_are_made_without_whole_logits_beside_a_prompt_too() -> None:
    run = compose(["model=tiny", "method=prompt"]).run
    assert skeleton(run, run.model.resolve()).model.lm_head.forward.__self__.direct


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=prompt", "method.num_virtual_tokens=0"], r"method\.num_virtual_tokens must be 1 or more, got 0"),
        (["method=p_tuning", "method.num_virtual_tokens=0"], r"method\.num_virtual_tokens must be 1 or more, got 0"),
        (["method=prompt", "method.init_text=' '"], r"method\.init_text must hold a text, got ' '; null starts"),
        (["method=p_tuning", "method.encoder_hidden_size=0"], r"method\.encoder_hidden_size must be 1 or more, got 0"),
        (["method=p_tuning", "method.encoder_num_layers=0"], r"method\.encoder_num_layers must be 1 or more, got 0"),
    ],
)
def test_values_out_of_range_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(["model=tiny", *words])


def test_a_text_without_a_token_is_refused() -> None:
    method = Prompt(num_virtual_tokens=2, init_text="abc", init_from=None)
    with pytest.raises(ValueError, match=r"method\.init_text must hold a token of the model's tokenizer, got 'abc'"):
        method.tokenize(_model("llama"), lambda text: {"input_ids": []})


def test_models_that_would_not_see_the_rows_as_tokens_are_refused() -> None:
    method = METHODS["prompt"]
    bert = _model("bert")
    bert.bert.encoder.layer[0].attention.self.is_causal = False
    with pytest.raises(ValueError, match=r"model must be causal, got BertLMHeadModel, an encoder"):
        dissect(bert)
    blocks = _model("llama")
    anatomy = replace(dissect(blocks), blocks=("lm_head.layers.0",))
    with pytest.raises(ValueError, match=r"model must take embedded tokens to hold a prompt, got LlamaForCausalLM"):
        method.attach(blocks, anatomy)
    layered = _model("llama")
    layered.config.hidden_size_per_layer_input = 8
    with pytest.raises(ValueError, match=r"model must embed tokens once to hold a prompt"):
        method.attach(layered, dissect(layered))
    odd = PTuning(num_virtual_tokens=2, encoder_hidden_size=None, encoder_num_layers=1)
    with pytest.raises(
        ValueError, match=r"method\.encoder_hidden_size must be given where the model's width is odd, 63"
    ):
        odd.rows(63)
