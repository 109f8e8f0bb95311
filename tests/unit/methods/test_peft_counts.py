"""What learns is as many numbers as the papers say, on models of their shapes, built on meta."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, RobertaConfig

from dsft.compose import compose
from dsft.models.anatomy import dissect

QV, QKVUD = "[q_proj,v_proj]", "[q_proj,k_proj,v_proj,up_proj,down_proj]"
ENCODER_QV = "[query,value]"


def llama(hidden: int, mlp: int, layers: int, heads: int, vocabulary: int = 32000, keys: int | None = None) -> Any:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys or heads, vocab_size=vocabulary,
    )  # fmt: skip


def roberta(hidden: int, layers: int, heads: int) -> Any:
    return RobertaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        is_decoder=True,
    )  # fmt: skip


SHAPES = {
    "llama-7b": llama(4096, 11008, 32, 32),
    "llama-13b": llama(5120, 13824, 40, 40),
    "llama3-8b": llama(4096, 14336, 32, 32, 128256, 8),
    "roberta-base": roberta(768, 12, 12),
    "roberta-large": roberta(1024, 24, 16),
}


def trained(shape: str, *words: str) -> tuple[int, int]:
    """How many numbers learn, and how many there are."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(SHAPES[shape])
    run = compose(["model=tiny", *words]).run
    model = run.method.attach(model, dissect(model))
    sizes = [(param.numel(), param.requires_grad) for param in model.parameters()]
    return sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)


@pytest.mark.parametrize(
    ("shape", "count", "words"),
    [
        ("llama-7b", 159_907_840, ["method=lora", "method.rank=64"]),
        ("llama-7b", 56_098_816, ["method=lora", "method.rank=32", f"method.target_modules={QKVUD}"]),
        ("llama-7b", 56_098_816, ["method=rslora", "method.rank=32", f"method.target_modules={QKVUD}"]),
        ("roberta-base", 294_912, ["method=lora_plus", "method.rank=8", f"method.target_modules={ENCODER_QV}"]),
        ("roberta-large", 786_432, ["method=pissa", "method.rank=8", f"method.target_modules={ENCODER_QV}"]),
        ("roberta-base", 43_008, ["method=vera", "method.rank=1024", f"method.target_modules={ENCODER_QV}"]),
        ("roberta-large", 61_440, ["method=vera", f"method.target_modules={ENCODER_QV}"]),
        ("llama-7b", 1_589_248, ["method=vera", "method.rank=1024"]),
        ("llama-13b", 2_416_640, ["method=vera", "method.rank=1024"]),
        ("llama-7b", 32 * (2 * 4096 + 11008), ["method=ia3"]),
        ("llama3-8b", 32 * (2 * 1024 + 14336), ["method=ia3"]),
        ("llama3-8b", 32 * 2 * 1024, ["method=ia3", "method.feedforward_modules=[]"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_as_many_numbers_learn_as_published(shape: str, count: int, words: list[str]) -> None:
    assert trained(shape, *words)[0] == count


@pytest.mark.parametrize(
    ("shape", "method", "rank", "percent"),
    [
        ("llama-7b", "lora", 32, 0.83),
        ("llama-7b", "dora", 32, 0.84),
        ("llama-13b", "dora", 32, 0.68),
        ("llama3-8b", "dora", 32, 0.71),
        ("llama3-8b", "lora", 32, 0.70),
    ],
)
def test_the_shares_of_doras_table(shape: str, method: str, rank: int, percent: float) -> None:
    learns, whole = trained(shape, f"method={method}", f"method.rank={rank}", f"method.target_modules={QKVUD}")
    assert round(100 * learns / whole, 2) == percent
