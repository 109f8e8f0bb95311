"""What an examination says of classes of each kind, and that it sees each fault that is planted in one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dsft.engine import trial_models
from dsft.engine.trial import examine
from dsft.models import attention, build
from dsft.models.attention import NAME
from dsft.models.family import Family
from dsft.models.files import ModelFiles
from dsft.models.spans import Span

SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[dict[str, Any], Family]] = {
    "llama": ({}, Family(model_type="llama")),
    "gemma3_text": ({"head_dim": 16, "sliding_window": 16}, Family(model_type="gemma3_text")),
    "phimoe": ({"num_local_experts": 4}, Family(model_type="phimoe")),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, Family(model_type="lfm2", packs=False)),
    "mamba2": ({"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1}, Family(model_type="", packs=False)),
    "qwen3_next": ({"head_dim": 16, **HYBRID}, Family(model_type="", packs=False)),
    "falcon": ({"num_key_value_heads": 4}, Family(model_type="", packs=False, attention="sdpa")),
    "gptj": ({"rotary_dim": 8}, Family(model_type="", packs=False, attention="eager")),
}  # fmt: skip


def files(model_type: str, **sizes: Any) -> ModelFiles:
    config = AutoConfig.for_model(model_type, **{**SIZES, **sizes})
    return ModelFiles(
        config=config, folder=None, name_or_path=model_type, init="random", revision=None, trust_remote_code=False
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_packs_or_is_computed_alone(model_type: str) -> None:
    sizes, expected = FAMILIES[model_type]
    found = examine(files(model_type, **sizes))
    assert (found.packs, found.attention) == (expected.packs, expected.attention), found
    assert found.recomputes
    assert bool(found.reason) is not found.packs


def test_a_model_that_sees_what_follows_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="must be causal, got RoFormerForCausalLM") as refused:
        examine(files("roformer"))
    assert "\n" not in str(refused.value)


def test_sizes_that_do_not_fit_together_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="num_key_value_heads must divide") as refused:
        examine(files("llama", num_attention_heads=3, num_key_value_heads=2, hidden_size=66, head_dim=22))
    assert "\n" not in str(refused.value)


def test_nothing_around_it_decides_a_verdict_and_no_random_stream_moves() -> None:
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert examine(files("llama")).packs
    assert torch.equal(torch.get_rng_state(), before)


class PlantedConfig(LlamaConfig):
    model_type = "planted"
    fault: str = "none"


class PlantedForCausalLM(LlamaForCausalLM):
    """A Llama with a fault in its blocks."""

    config_class = PlantedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = FAULTS[config.fault](config, layer.mlp)
        self.post_init()


class Convolved(nn.Module):
    """A convolution over the row, across the ends of its examples."""

    def __init__(self, config: Any, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.mixed = nn.Conv1d(config.hidden_size, config.hidden_size, 3, groups=config.hidden_size, padding=2)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = self.mixed(hidden.transpose(1, 2))[..., : hidden.shape[1]].transpose(1, 2)
        return self.inner(hidden + mixed)  # type: ignore[no-any-return]


class Drawn(nn.Module):
    """A module that adds random numbers in training."""

    def __init__(self, config: Any, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        noise = 0.1 * torch.randn_like(hidden) if self.training else 0.0
        return self.inner(hidden + noise)  # type: ignore[no-any-return]


class Corrected(nn.Module):
    """A module with a buffer that decides, and that its class leaves out of what it saves."""

    def __init__(self, config: Any, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("correction", torch.zeros(config.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden * (1 + self.correction))  # type: ignore[no-any-return]


class Escaped(nn.Module):
    """A module whose parameter torch makes on CPU though the model is built on meta, each time with other values."""

    def __init__(self, config: Any, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.normal(1.0, 0.3, size=(config.hidden_size,), device="cpu"))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden * self.scale)  # type: ignore[no-any-return]


class Summed(nn.Module):
    """A module that adds into a tensor of its input's type, whatever the type of what it adds."""

    def __init__(self, config: Any, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        rows = torch.arange(hidden.shape[1])
        return torch.zeros_like(hidden).index_add(1, rows, self.inner(hidden))


FAULTS = {
    "none": lambda config, inner: inner, "convolved": Convolved, "drawn": Drawn, "corrected": Corrected,
    "escaped": Escaped, "summed": Summed,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def planted_family() -> None:
    AutoConfig.register("planted", PlantedConfig, exist_ok=True)
    AutoModelForCausalLM.register(PlantedConfig, PlantedForCausalLM, exist_ok=True)


def test_a_planted_convolution_across_examples_is_seen() -> None:
    assert examine(files("planted")).packs  # the class without its fault
    found = examine(files("planted", fault="convolved"))
    assert not found.packs
    assert found.attention == NAME
    assert "read each other" in found.reason


def test_planted_random_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="draws random numbers"):
        examine(files("planted", fault="drawn"))


def test_a_buffer_that_decides_is_in_a_whole_result_and_its_loss_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(files("planted", fault="corrected")).whole
    calls: list[str] = []

    def once(model: nn.Module) -> dict[str, Tensor]:
        calls.append("")
        return build.persistent_buffers(model) if len(calls) == 1 else {}  # first the folder, then the result

    monkeypatch.setattr(trial_models, "persistent_buffers", once)
    assert not examine(files("planted", fault="corrected")).whole


def test_a_tensor_off_meta_is_read_from_the_folder_and_its_loss_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(files("planted", fault="escaped")).packs
    monkeypatch.setattr(build, "_put_on_meta", lambda model: None)
    with pytest.raises(ValueError, match="scale"):
        examine(files("planted", fault="escaped"))


def test_a_class_that_fails_in_bf16_where_its_weights_learn_is_seen() -> None:
    assert examine(files("planted")).bf16_whole
    found = examine(files("planted", fault="summed"))
    assert (found.packs, found.bf16, found.bf16_whole) == (True, True, False)


def test_a_pass_that_calls_a_block_without_a_gradient_is_seen() -> None:
    assert examine(files("planted")).graded
    sizes = {"H_cycles": 1, "L_cycles": 2, "L_bp_cycles": [1], "num_layers_per_stack": 1, "num_hidden_layers": 3}
    assert not examine(files("hrm_text", **sizes)).graded


WINDOWED = {"sliding_window": 16, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def test_a_window_that_is_dropped_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine(files("qwen2", use_sliding_window=True, **WINDOWED)).ragged
    monkeypatch.setattr(attention, "span_of", lambda module, window: Span())
    found = examine(files("qwen2", use_sliding_window=True, **WINDOWED))
    assert not found.ragged
    assert "otherwise than by the class itself" in found.reason


def test_a_rope_that_goes_by_the_longest_of_a_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [9.0] * 8}
    sizes = {"rope_parameters": {**rope, "original_max_position_embeddings": 64}, "max_position_embeddings": 512}
    assert examine(files("phi3", **sizes)).packs
    monkeypatch.setattr(build, "own_lengths", lambda model, packed: None)
    assert not examine(files("phi3", **sizes)).packs
