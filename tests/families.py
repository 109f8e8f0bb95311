"""Folders of small random models of any family that transformers has, for what tiny and tiny_moe do not show."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dsft.models.bytes_tokenizer import byte_tokenizer

NUMBERS: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 256, "bos_token_id": 257,
    "eos_token_id": 259,
}  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **EXPERTS, "first_k_dense_replace": 1, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1,
        "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
    "glm4_moe": {**EXPERTS, "head_dim": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "diffllama": {},
    "mistral": {"sliding_window": 100},
    "afmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_shared_experts": 1},
    "mamba": {"state_size": 8},
}  # fmt: skip
"""model_type -> numbers beside NUMBERS, or in their place."""


def write_family(folder: Path, family: str, **numbers: Any) -> Path:
    """Write a model of that type to folder: matrices that keep a hidden state's size, biases of a router that count."""
    config = AutoConfig.for_model(family, **{**NUMBERS, **FAMILIES[family], **numbers})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            drawn = torch.randn(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(drawn / 2)
            elif tensor.ndim > 1:
                tensor.copy_(drawn if "embed" in name else drawn * tensor.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
