"""LoRA beside fused experts: PEFT reads the file, computes the same, has the same gradients and merges the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.family_models import config_of
from dsft.compose import compose
from dsft.engine import scored
from dsft.engine.assemble import Session, assemble
from dsft.engine.trial_models import ALONE
from dsft.loaded import unpacked_base
from dsft.methods import expert_lora, peft_bridge
from dsft.models.anatomy import dissect
from dsft.models.build import build_meta
from dsft.models.bytes_tokenizer import byte_tokenizer
from dsft.models.small import fill
from dsft.quantizers.footprint import footprint

BOUND = 1e-5
COMMON: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2, "num_experts": 6, "num_local_experts": 6,
    "n_routed_experts": 6, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
GROUPED = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {}, "qwen2_moe": {"shared_expert_intermediate_size": 16}, "qwen3_moe": {}, "olmoe": {},
    "deepseek_v3": {**LATENT, **GROUPED, "head_dim": 4, "num_key_value_heads": 4}, "glm4_moe": GROUPED,
    "granitemoe": {}, "gpt_oss": {"sliding_window": 8},
}  # fmt: skip


BOTH = ("method.target_modules=[all-linear,experts]",)


def written(model_type: str, folder: Path) -> Path:
    """A small model of this type with six experts, in a folder."""
    config = AutoConfig.for_model(model_type, **{**COMMON, **FAMILIES[model_type]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def started(folder: Path, *words: str) -> Session:
    """A run's session, whose adapters are random numbers."""
    run = compose([
        "model=custom", f"model.path={folder}", "method=lora", *BOTH,
        "train.precision=fp32", "tracker=[]", "launcher=local", *words,
    ]).run  # fmt: skip
    session = assemble(run, run.model.resolve(), ALONE)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in session.model.parameters():
            if param.requires_grad:
                param.copy_(0.1 * torch.randn(param.shape, generator=draw))
    return session


def learned(session: Session) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in session.model.named_parameters() if param.requires_grad}


def in_peft(folder: Path, adapter: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft_bridge.load(base, adapter).train()
    for name, param in model.named_parameters():
        param.requires_grad_(".lora_" in name)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place, made = tmp_path_factory.mktemp("models"), dict[str, Path]()

    def of(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = written(model_type, place / model_type)
        return made[model_type]

    return of


def examples() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(3, 260, (length,)) for length in (23, 9)]


@pytest.mark.parametrize("rank", [3, 4, 6])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_peft_reads_merges_and_has_the_same_gradients(
    model_type: str, rank: int, models: Callable[[str], Path], tmp_path: Path
) -> None:
    session = started(models(model_type), "method.rank=4", "method.alpha=6", f"method.expert_rank={rank}")
    mine = scored.scored(session.model, examples(), packed=True)
    session.run.method.save(session.model, learned(session), tmp_path, "base")
    theirs = in_peft(models(model_type), tmp_path)
    found = scored.one_by_one(theirs, examples())
    assert scored.off(mine.scores, found.scores) <= BOUND
    assert scored.apart(as_in_file(session, mine.grads), without_name(found.grads)) <= BOUND
    merged = scored.one_by_one(theirs.merge_and_unload().requires_grad_(True), examples())
    assert scored.off(mine.scores, merged.scores) <= BOUND


def as_in_file(session: Session, values: dict[str, Tensor]) -> dict[str, Tensor]:
    stacked = expert_lora.in_file(session.model)
    learning = {name: value for name, value in values.items() if ".lora_" in name}
    return {
        stacked.get(name, f"base_model.model.{name.replace('.default.', '.')}"): expert_lora.to_file(name, value)
        if name in stacked else value
        for name, value in learning.items()
    }  # fmt: skip


def without_name(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".default.", "."): value for name, value in values.items()}


def off_by(session: Session, folder: Path, adapter: Path) -> float:
    """How far PEFT's scores of what save writes are from those of the session."""
    mine = scored.scored(session.model, examples(), packed=True)
    session.run.method.save(session.model, learned(session), adapter, "base")
    return scored.off(mine.scores, scored.one_by_one(in_peft(folder, adapter), examples()).scores)


@pytest.mark.parametrize("packing", [["quantization=nf4", "quantization.unpack_mib=0"], ["quantization=int8"]])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_step_on_packed_experts_is_that_on_the_decoded_base(
    model_type: str, packing: list[str], models: Callable[[str], Path], tmp_path: Path
) -> None:
    words = ("method.rank=4", "method.expert_rank=3")
    session = started(models(model_type), *words, *packing)
    assert footprint(session.model).expert_parameters == 0
    unpacked_base(session.run).save_pretrained(tmp_path / "decoded")
    byte_tokenizer().save_pretrained(tmp_path / "decoded")
    plain = started(tmp_path / "decoded", *words)
    mine, theirs = (scored.scored(each.model, examples(), packed=True) for each in (session, plain))
    assert scored.off(mine.scores, theirs.scores) <= 1e-6
    assert scored.apart(mine.grads, {name: theirs.grads[name] for name in mine.grads}) <= BOUND
    assert off_by(session, tmp_path / "decoded", tmp_path / "adapter") <= BOUND
    assert off_by(session, models(model_type), tmp_path / "adapter") > 100 * BOUND  # what is packed is not the same


def expert_major(name: str, value: Tensor) -> Tensor:
    return TO_FILE(name, value) if name.endswith("A") else value.permute(1, 0, 2).flatten(1)


def without_an_expert(name: str, value: Tensor) -> Tensor:
    kept = torch.ones(len(value), 1, 1)
    kept[2] = 0
    return TO_FILE(name, value * kept)


def halved(name: str, value: Tensor) -> Tensor:
    return TO_FILE(name, value) / (2 if name.endswith("B") else 1)


TO_FILE = expert_lora.to_file


@pytest.mark.parametrize("fault", [expert_major, without_an_expert, halved])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_a_planted_fault_of_the_file_is_seen(
    fault: Callable[[str, Tensor], Tensor], model_type: str, models: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    session = started(models(model_type), "method.rank=4", "method.expert_rank=3")
    monkeypatch.setattr(expert_lora, "to_file", fault)
    assert off_by(session, models(model_type), tmp_path) > 100 * BOUND


def test_a_planted_other_nesting_does_not_fit(models: Callable[[str], Path], tmp_path: Path) -> None:
    session = started(models("mixtral"), "method.rank=4")
    for name, module in session.model.named_modules():
        if name.endswith(".experts"):
            module._parameters = dict(reversed(list(module._parameters.items())))
    with pytest.raises(RuntimeError, match="size mismatch"):
        off_by(session, models("mixtral"), tmp_path)


@pytest.mark.parametrize("words", [
    ["method.target_modules=[experts]"], ["+method.options.use_rslora=true"],
    ["+method.options.rank_pattern={q_proj: 2}"],
    ["+method.options.rank_pattern={experts.down_proj: 2}", "+method.options.alpha_pattern={experts.down_proj: 9}"],
    ["+method.options.rank_pattern={layers.1.mlp.experts.down_proj: 3}"],
    ["method.expert_rank=2", "+method.options.rank_pattern={experts.down_proj: 3}"],
    ["method.expert_rank=2", "+method.options.alpha_pattern={down_proj: 5}"],
])  # fmt: skip
def test_ranks_and_scales_are_those_of_pefts_configuration(
    words: list[str], models: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = models("qwen2_moe")
    assert off_by(started(folder, "method.rank=4", *words), folder, tmp_path) <= BOUND


def test_a_run_starts_from_an_adapter_of_experts(models: Callable[[str], Path], tmp_path: Path) -> None:
    words = ("method.rank=4", "method.expert_rank=3")
    first = started(models("mixtral"), *words)
    first.run.method.save(first.model, learned(first), tmp_path, "base")
    run = first.run.method.started_from(str(tmp_path))
    with pytest.raises(ValueError, match=r"agree in the rank of experts, 2, got 3; set method.expert_rank=3"):
        started(models("mixtral"), "method.rank=4", "method.expert_rank=2", f"method.init_from={tmp_path}")
    stored = run.stored(first.model)
    assert stored.keys() == learned(first).keys()
    assert all(torch.equal(stored[name], value) for name, value in learned(first).items())


@pytest.mark.parametrize(("model_type", "words", "message"), [
    ("mixtral", ["method.dropout=0.1"], "method.dropout must be 0"),
    ("mixtral", ["+method.options.use_dora=true"], "use_dora must be left out"),
    ("mixtral", ["method.rank=4", "method.expert_rank=25"], "method.expert_rank must be at most 24"),
    ("mixtral",
     ["method.rank=4", "method.expert_rank=2", "+method.options.rank_pattern={layers.1.mlp.experts.down_proj: 3}"],
     "must say one thing of model.layers.1.mlp.experts.down_proj, got 3 by layers.1"),
    ("mixtral", ["method.rank=4", "+method.options.alpha_pattern={experts.down_proj: 8, down_proj: 32}"],
     "alpha_pattern must say one thing of .*, got 8 by experts.down_proj and 32 by"),
    ("mixtral", ["method=dora"], "must not name experts with this method"),
    ("mixtral", ["method.target_modules=attention", "method.expert_rank=4"], "expert_rank must be null where"),
    ("mixtral", ["method.expert_rank=0"], "method.expert_rank must be 1 or more"),
    ("mixtral", ["method=adalora"], "must not name experts with this method"),
    ("mixtral", ["method.rank=4", "method.expert_rank=2", "+method.options.rank_pattern={experts.gate_up_proj: 3, "
     "experts.down_proj: 3}"], "method.expert_rank=2 has no effect"),
    ("mixtral", ["method.target_modules='.*(q_proj|experts)'"], "matches model.layers.0.mlp.experts, fused experts"),
    ("mixtral", ["method.target_modules=[all-linear,mlp]"], "mlp matches no linear.*; fused experts are experts"),
    ("mixtral", ["method=pissa"], "must not name experts with this method"),
    ("mixtral", ["method=qat_lora"], "must not name experts with this method"),
    ("llama", ["method.rank=4"], "has no experts that are stacks of three"),
    ("dbrx", ["method.rank=4"], "has no experts that are stacks of three"),
    ("llama4_text", ["method.rank=4"], "Llama4TextExperts does not compute them through transformers' interface"),
])  # fmt: skip
def test_what_cannot_be_adapted_is_refused_in_one_line(model_type: str, words: list[str], message: str) -> None:
    config = AutoConfig.for_model(model_type, **COMMON) if model_type in ("llama", "mixtral") else config_of(model_type)
    with pytest.raises(ValueError, match=message) as refused:
        attach(config, "method=lora", *BOTH, *words)
    assert "\n" not in str(refused.value)


def attach(config: Any, *words: str) -> None:
    run = compose(["model=tiny", *words], planning=True).run
    model = build_meta(replace(run.files(), config=config), torch.float32)
    run.method.attach(model, dissect(model))
