"""Small random models of every causal language model class that transformers has, each in a folder of its own.

The shape of a model is the default configuration of its model_type, made small (dsft/models/small.py). CHANGES says
what has to be different where a default describes no causal model or none that can be built; VARIANTS are further rows.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsft.models.build import build_meta
from dsft.models.bytes_tokenizer import byte_tokenizer
from dsft.models.files import ModelFiles
from dsft.models.small import NoCopyError, fill, random_settings, small_copies, still

VOCABULARY = 264
"""Rows of an embedding: the bytes, four special tokens, and a multiple of 8."""


@dataclass(frozen=True)
class Kind:
    """One row. changes: of the default configuration; drops: its dropouts stay, so that plain transformers draws other
    numbers and is not compared.
    """

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    drops: bool = False


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 4096,
    "short_factor": [1.0] * 48, "long_factor": [4.0 + index for index in range(48)],
}  # fmt: skip

DECODER = {"is_decoder": True}
ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
)  # fmt: skip
"""By default; DECODER makes them causal."""

INDEXED = {
    "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}  # fmt: skip

CHANGES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(ENCODERS, DECODER),
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "num_hidden_layers": 4,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 4}},
    "dots1": {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 4096, "mamba_n_heads": 64, "mamba_d_head": 64},
    "hunyuan_v1_dense": {"num_key_value_heads": 8, "head_dim": 128},
    "hunyuan_v1_moe": {"num_key_value_heads": 8, "head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
}  # fmt: skip
"""Model type -> what a causal model of it needs and its default configuration has not."""

VARIANTS: Mapping[str, Kind] = {
    "gpt2 with dropout": Kind("gpt2", drops=True),
    "llama tied": Kind("llama", {"tie_word_embeddings": True}),
    "phi3 with longrope": Kind("phi3", {"max_position_embeddings": 131072, "rope_parameters": LONG}),
    "qwen2 with windows": Kind("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}),
    "qwen2_moe with windows": Kind(
        "qwen2_moe", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}
    ),
}

LORA_RANKS = {"axk2": 2}
"""Ranks of LoRA where a linear of the small model has a smaller side than 4."""


def names() -> list[str]:
    """Every row: the model types of transformers that name a causal language model, then the variants."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def kind(name: str) -> Kind:
    """What the row of this name is."""
    return VARIANTS.get(name) or Kind(name, CHANGES.get(name, {}))


def config_of(name: str) -> Any:
    """The configuration of a row, of its full size. Raises what transformers raises for one that it cannot make."""
    from transformers import AutoConfig

    row = kind(name)
    return AutoConfig.for_model(row.model_type, **row.changes)


def small_models(name: str) -> Iterator[Any]:
    """Small models of a row, with random weights, the smallest first. Raises NoCopyError if no copy can be built."""
    from transformers import AutoModelForCausalLM

    copies = small_copies(
        config_of(name), lambda one: build_meta(shape_of(name, one), torch.float32, "eager"), vocabulary=VOCABULARY
    )
    for config in copies:
        if not kind(name).drops:
            still(config, [key for key in random_settings(config) if "drop" in key])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fill(model)
        yield model


def shape_of(name: str, config: Any) -> ModelFiles:
    """A model of which only the configuration is there."""
    return ModelFiles(
        config=config, folder=None, name_or_path=name, init="random", revision=None, trust_remote_code=False
    )


def make(name: str, folder: Path) -> None:
    """Write the first small model of a row that computes into folder, with a tokenizer. Raises NoCopyError as above."""
    if (folder / "tokenizer.json").is_file():
        return
    failed: Exception | None = None
    for model in small_models(name):
        try:
            with torch.no_grad():
                model(input_ids=torch.arange(3, 43)[None], use_cache=False)
        except Exception as error:  # of any class, over sizes that do not fit together
            failed = error
            continue
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return
    raise NoCopyError("no copy computes") from failed
