"""What small models of families are shaped like, where the default configuration of a model_type is not enough.

What a row took from here stands in its line of families.json, so that an entry can be added without measuring all anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One row. changes: of the default configuration; drops: its dropouts stay, so that plain transformers draws other
    numbers and is not compared; adapts: LoRA is on fused experts too, and no other method is run.
    """

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    drops: bool = False
    adapts: bool = False


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
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "num_hidden_layers": 4,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_routed_experts": 64, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 4096, "mamba_n_heads": 64, "mamba_d_head": 64},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0] * 35},
    "hunyuan_v1_dense": {"num_key_value_heads": 8, "head_dim": 128},
    "hunyuan_v1_moe": {"num_key_value_heads": 8, "head_dim": 128},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
}  # fmt: skip
"""Model type -> what a causal model of it needs and its default configuration has not."""

EXPERTS = (
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "dots1", "dots3_note", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo",
    "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text", "inkling_text", "jamba", "kimi_linear",
    "kolibri1", "laguna", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text",
    "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe",
    "qwen3_next", "qwen4_exp", "qwen4_exp_text", "solar_open", "zaya",
)  # fmt: skip
"""Model types that LoRA trains and whose fused experts are computed through transformers' interface."""

VARIANTS: Mapping[str, Kind] = {
    "gpt2 with dropout": Kind("gpt2", drops=True),
    "llama tied": Kind("llama", {"tie_word_embeddings": True}),
    "phi3 with longrope": Kind("phi3", {"max_position_embeddings": 131072, "rope_parameters": LONG}),
    "qwen2 with windows": Kind("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}),
    "qwen2_moe with windows": Kind(
        "qwen2_moe", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}
    ),
    **{f"{name} with experts": Kind(name, CHANGES.get(name, {}), adapts=True) for name in EXPERTS},
}

LORA_RANKS = {"axk2": 2, "doge": 1, "hunyuan_v1_moe": 1, "hy_v4": 2}
"""Ranks of LoRA where a linear of the small model has a smaller side than 4."""
