"""What a loop written by hand on transformers and PEFT needs, made without dsft: its adapter's targets, its batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Encoded = tuple[list[int], list[int]]
"""Tokens of an example, and its labels: -100 where nothing is supervised."""


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
