"""What a loop written by hand on transformers and PEFT needs, made without dsft: model, adapter, batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.job import RANK, Job

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Encoded = tuple[list[int], list[int]]
"""Tokens of an example, and its labels: -100 where nothing is supervised."""


def load(job: Job) -> tuple[Any, Any, Any]:
    """Model, PEFT configuration (None: train it all) and tokenizer as a user of transformers makes them."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    torch.manual_seed(0)
    dtype = DTYPES[job.precision]
    packed = {}
    if job.mode == "qlora":
        packed["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, **packed)
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
    return model, None if job.mode == "full" else adapter, AutoTokenizer.from_pretrained(job.model)


def encode(tokenizer: Any, row: dict[str, str]) -> Encoded:
    """Question and answer as a chat; the answer and its end-of-turn token are supervised."""
    turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    given = tokenizer(asked, add_special_tokens=False)["input_ids"]
    tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
    end = len(tokens) - tokens[::-1].index(tokenizer.eos_token_id)
    return tokens, [-100] * len(given) + tokens[len(given) : end] + [-100] * (len(tokens) - end)


def padded(examples: Sequence[Encoded]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, L), padded on the right to the longest of B examples."""
    width = max(len(tokens) for tokens, _ in examples)
    return {
        "input_ids": torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in examples]),
        "attention_mask": torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in examples]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples]),
    }
