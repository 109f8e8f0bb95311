"""What a method of the bridge computes is what PEFT's own model computes, and what it leaves PEFT reads."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsft.comm.world import World
from dsft.compose import compose
from dsft.engine.assemble import Session, assemble
from dsft.engine.result import write_result
from dsft.methods.peft_bridge import ADAPTER, peft_name
from dsft.methods.pissa import principal
from tests.contract.sessions import batch_of

ANY = ["method=peft", "method.target_modules=[q_proj,down_proj]"]
CASES = {
    "lora": ["method=lora", "method.alpha=24"],
    "patterns": [
        "method=lora", "+method.options.rank_pattern={q_proj: 4, up_proj: 2}",
        "+method.options.alpha_pattern={v_proj: 5}",
    ],
    "rslora": ["method=rslora"],
    "lora_plus": ["method=lora_plus", "method.target_modules=attention"],
    "dora": ["method=dora"],
    "pissa": ["method=pissa", "method.rank=8", "method.iterations=null"],
    "pissa patterns": [
        "method=pissa", "+method.options.rank_pattern={q_proj: 4}", "+method.options.use_rslora=true",
        "method.target_modules=[q_proj,down_proj]", "method.iterations=null",
    ],
    "vera": ["method=vera"],
    "ia3": ["method=ia3"],
    "loha": ["method=peft"],
    "oft": [*ANY, "method.type=peft.OFTConfig", "+method.options.oft_block_size=16"],
    "fourierft": [*ANY, "method.type=peft.FourierFTConfig", "+method.options.n_frequency=50"],
    "delora": [*ANY, "method.type=peft.DeloraConfig"],
}  # fmt: skip
ALONE = World(0, 1, 0, torch.device("cpu"))
TOKENS = torch.arange(12)[None]


def session_of(*words: str) -> Session:
    run = compose(["model=tiny", "train.precision=fp32", "train.steps=1", "launcher=local", *words]).run
    return assemble(run, run.model.resolve(), ALONE)


def moved(*words: str) -> Session:
    """A session whose adapter has left its start."""
    session = session_of(*words)
    torch.manual_seed(1)
    with torch.no_grad():
        for param in session.model.parameters():
            if param.requires_grad:
                param += 0.05 * torch.randn_like(param)
    session.model.eval()
    return session


def base_of(session: Session) -> Any:
    return AutoModelForCausalLM.from_pretrained(session.files.folder, dtype=torch.float32).eval()


def call(model: Any) -> Tensor:
    """Logits; our attention wants to be told that the tokens are one example."""
    theirs = "dsft" not in str(model.config._attn_implementation)
    known = {} if theirs else {"segment_lengths": (TOKENS.numel(),), "position_ids": torch.arange(TOKENS.numel())[None]}
    value: Tensor = model(input_ids=TOKENS, use_cache=False, **known).logits
    return value


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return call(model)


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_pefts_own_model(case: str) -> None:
    session = moved(*CASES[case])
    config = session.model.peft_config[ADAPTER]
    if case.startswith("pissa"):
        config.init_lora_weights = "pissa"  # PEFT takes the principal part out of the base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT cannot convert rslora, patterns and pissa together
        theirs = get_peft_model(base_of(session), config)
    ours = {name: param for name, param in session.model.named_parameters() if param.requires_grad}
    named = {name.removeprefix("base_model.model."): param for name, param in theirs.named_parameters()}
    with torch.no_grad():
        for name, param in ours.items():
            named[name].copy_(param)
    theirs.eval()
    for model in (session.model, theirs):
        call(model).square().mean().backward()
    assert off(logits(session.model), logits(theirs)) < 1e-6
    assert {name for name, param in named.items() if param.requires_grad} == ours.keys()
    for name, param in ours.items():
        assert param.grad is not None
        assert param.grad.norm() > 0
        assert off(param.grad, named[name].grad) < 1e-5, name  # sums of 12 tokens in another order
    assert off(logits(session.model), logits(base_of(session))) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_peft_model_reads_the_result_and_merges_it(case: str, tmp_path: Path) -> None:
    session = moved(*CASES[case])
    write_result(session, tmp_path)
    fresh = PeftModel.from_pretrained(base_of(session), tmp_path).eval()
    assert off(logits(fresh), logits(session.model)) < 1e-6
    assert off(logits(fresh.merge_and_unload()), logits(session.model)) < 1e-5  # the sum is in the weight
    learned = {peft_name(name) for name, param in session.model.named_parameters() if param.requires_grad}
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        more = set(file.keys()) - learned
        assert learned <= set(file.keys())
    beside = {"vera": {"base_model.vera_A", "base_model.vera_B"}, "delora": {n for n in more if "delora_w_norm" in n}}
    assert more == beside.get(case, set())


def test_rslora_divides_by_the_root_of_the_rank_on_the_fused_path() -> None:
    session = moved("method=rslora", "method.rank=9", "method.alpha=6", "method.target_modules=q_proj")
    layer = session.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 128)
    update = x @ layer.lora_A[ADAPTER].weight.T @ layer.lora_B[ADAPTER].weight.T
    assert type(layer).__name__ == "FusedLinear"
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 6 / 9**0.5 * update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("iterations", [None, 16])
def test_pissa_starts_from_the_largest_singular_values(iterations: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 24) @ torch.diag(0.7 ** torch.arange(24.0))  # singular values apart
    factors = principal(weight, 5, 2.0, iterations)
    rest = weight - 2.0 * factors["b"] @ factors["a"]
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:19], values[5:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(factors["a"].norm(dim=1), factors["b"].norm(dim=0), rtol=1e-4, atol=1e-4)
    mirrored = principal(weight.flip(0), 5, 2.0, iterations)["a"]  # the same right vectors, whatever their sign
    torch.testing.assert_close(mirrored, factors["a"], rtol=1e-2, atol=1e-2)


def test_pissa_with_dropout_drops_from_what_learns_alone() -> None:
    session = session_of("method=pissa", "method.dropout=0.5", "method.target_modules=q_proj")
    layer = session.model.model.layers[0].self_attn.q_proj.train()
    x = torch.randn(6, 128)
    session.draws.begin(1, batch_of(6), x.device)
    got = layer(x)
    session.draws.begin(1, batch_of(6), x.device)
    dropped = layer.lora_dropout[ADAPTER](x)
    assert 0 < (dropped == 0).sum() < x.numel()
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    torch.testing.assert_close(got, layer.base_layer(x) + (dropped - x) @ down.T @ up.T, rtol=1e-4, atol=1e-5)


def test_vera_shares_its_projections_and_draws_them_as_peft() -> None:
    session = session_of("method=vera", "method.rank=8")
    config = session.model.peft_config[ADAPTER]
    theirs = get_peft_model(base_of(session), config)
    layers = [module for module in session.model.modules() if hasattr(module, "vera_A")]
    assert len({id(layer.vera_A[ADAPTER]) for layer in layers}) == 1
    for side in ("vera_A", "vera_B"):
        mine, other = getattr(layers[0], side)[ADAPTER], getattr(theirs.base_model, side)[ADAPTER]
        assert torch.equal(mine, other)
        assert not mine.requires_grad
    assert all(torch.equal(layer.vera_lambda_d[ADAPTER], torch.full((8,), 0.1)) for layer in layers)


def test_ia3_scales_keys_values_and_what_enters_the_down_projection() -> None:
    session = session_of("method=ia3")
    found = {name: param.shape for name, param in session.model.named_parameters() if param.requires_grad}
    assert {name.split(".")[4] for name in found} == {"k_proj", "v_proj", "down_proj"}
    assert {tuple(shape) for name, shape in found.items() if "down_proj" in name} == {(1, 192)}
    assert {tuple(shape) for name, shape in found.items() if "down_proj" not in name} == {(64, 1)}
    written = session.model.peft_config[ADAPTER]
    assert json.loads(json.dumps(sorted(written.feedforward_modules))) == ["down_proj"]


@pytest.mark.parametrize("case", ["lora", "patterns", "dora"])
def test_a_run_starts_where_another_left_its_adapter(case: str, tmp_path: Path) -> None:
    session = moved(*CASES[case])
    write_result(session, tmp_path)
    assert off(logits(session_of(*CASES[case], f"method.init_from={tmp_path}").model), logits(session.model)) < 1e-6


def test_a_run_starts_from_what_pissa_left(tmp_path: Path) -> None:
    session = moved("method=pissa", "method.rank=8")
    write_result(session, tmp_path)
    started = session_of("method=lora", "method.rank=16", "method.alpha=16", f"method.init_from={tmp_path}")
    assert off(logits(started.model), logits(session.model)) < 1e-6


def _pefts(folder: Path, **keys: Any) -> Any:
    """A model of PEFT alone with an adapter that does something, saved in folder."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False, **keys})
    model = get_peft_model(base_of(session_of("method=lora")), config).eval()
    model.save_pretrained(folder)
    return model


def test_a_run_starts_from_pefts_own_folder(tmp_path: Path) -> None:
    model = _pefts(tmp_path)
    words = ["method=lora", "method.rank=4", "method.alpha=8", "method.target_modules=q_proj"]
    started = session_of(*words, f"method.init_from={tmp_path}")
    assert off(logits(started.model), logits(model)) < 1e-6
    assert off(logits(started.model), logits(base_of(started))) > 1e-3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method.rank=8"], r"method\.init_from must agree in r, 8, got 4; set method\.rank to it"),
        (["method.alpha=9"], r"must agree in lora_alpha, 9\.0, got 8; set method\.alpha to it"),
        (["+method.options.use_dora=true"], r"must agree in use_dora, True, got False"),
        (
            ["method.target_modules=[q_proj,v_proj]"],
            r"must agree in target_modules, .*v_proj\.lora_A\.weight is missing",
        ),
        (["method.target_modules=v_proj"], r"must agree in target_modules, .*q_proj\.lora_A\.weight is only there"),
        (
            ["model.config.hidden_size=64"],
            r"must be an adapter of this model, .* is \[4, 128\] there and \[4, 64\] here",
        ),
        (["method.init_from=/nowhere"], r"must be a folder with adapter_config\.json, got /nowhere; give RUN/adapter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_adapter_that_does_not_fit_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    _pefts(tmp_path)
    fitting = ["method=lora", "method.rank=4", "method.alpha=8", "method.target_modules=q_proj"]
    with pytest.raises(ValueError, match=said):
        session_of(*fitting, f"method.init_from={tmp_path}", *words)


def test_an_adapter_whose_base_was_changed_too_is_refused(tmp_path: Path) -> None:
    _pefts(tmp_path, init_lora_weights="pissa")
    words = ["method=lora", "method.rank=4", "method.alpha=8", "method.target_modules=q_proj"]
    with pytest.raises(ValueError, match="must hold a plain adapter, got init_lora_weights=pissa"):
        session_of(*words, f"method.init_from={tmp_path}")
