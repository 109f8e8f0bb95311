"""How many numbers learn: the papers' closed forms on tiny, and what they published, on shapes built on meta."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dsft.compose import compose
from dsft.engine.assemble import skeleton
from dsft.models.anatomy import dissect

D, F, KV, LAYERS, HEADS = 128, 192, 64, 3, 4
LINEARS_OUT = D + KV + KV + D + F + F + D
"""Of a block of tiny: q, k, v, o, gate, up, down."""
NORMS = (2 * LAYERS + 1) * D


def _adapter(width: int, size: int) -> int:
    return 2 * size * width + size + width


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["method=bitfit"], LAYERS * LINEARS_OUT),
        (["method=bitfit", "method.exclude=['*.mlp.*']"], LAYERS * (D + KV + KV + D)),
        (["method=bitfit", "quantization=nf4"], LAYERS * LINEARS_OUT),
        (["method=ssf"], 2 * (LAYERS * LINEARS_OUT + NORMS)),
        (["method=ssf", "method.norms=false"], 2 * LAYERS * LINEARS_OUT),
        (["method=houlsby"], 2 * LAYERS * _adapter(D, 8) + NORMS),
        (["method=houlsby", "method.train_norms=false"], 2 * LAYERS * _adapter(D, 8)),
        (["method=pfeiffer", "method.reduction_factor=4"], LAYERS * _adapter(D, 32)),
        (["method=parallel_adapter"], LAYERS * _adapter(D, 64)),
        (["method=compacter"], 4**3 + 2 * LAYERS * 3 * (D + 8) + NORMS),
        (["method=compacter", "method.after=[mlp]", "method.phm_dim=2"], 2**3 + LAYERS * 3 * (D + 8) + NORMS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_learns_is_counted_as_the_paper_does(words: list[str], expected: int) -> None:
    run = compose(["model=tiny", *words]).run
    assert _learning(skeleton(run, run.model.resolve()).model) == expected


def _learning(model: nn.Module, without: str = "no such name") -> int:
    named = ((name, param) for name, param in model.named_parameters() if without not in name)
    return sum(param.numel() for _, param in named if param.requires_grad)


def _attached(words: list[str], model_type: str, **sizes: Any) -> nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    return compose(["model=tiny", *words]).run.method.attach(model, dissect(model))


GPT3 = {"hidden_size": 12288, "num_hidden_layers": 96, "num_attention_heads": 96, "intermediate_size": 49152}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


@pytest.mark.parametrize(("reduction", "published"), [(12288, 7_078_080), (1536, 40_109_568)])
def test_houlsby_on_gpt3_is_what_lora_compares_itself_to(reduction: int, published: int) -> None:
    """Hu et al. 2021, table 4: adapter-H on GPT-3 175B, 7.1 and 40.1 million."""
    words = ["method=houlsby", f"method.reduction_factor={reduction}", "method.train_norms=false"]
    assert _learning(_attached(words, "gpt_neox", vocab_size=100, **GPT3)) == published


def test_pfeiffer_on_twelve_blocks_of_768_is_adapterhubs_count() -> None:
    """Reduction 16 on BERT-base's shape: 894,528."""
    assert _learning(_attached(["method=pfeiffer"], "llama", **BASE)) == 894_528


@pytest.mark.parametrize(
    ("after", "published"), [("[attention,mlp]", 0.073), ("[mlp]", 0.047)], ids=["compacter", "compacter++"]
)
def test_compacter_on_the_blocks_of_t5_base_is_the_papers_share(after: str, published: float) -> None:
    """Karimi Mahabadi et al. 2021, table 1: percent of 222.9 M, with the 62 norms of an encoder and decoder."""
    words = ["method=compacter", "method.reduction_factor=32", f"method.after={after}"]
    model = _attached(words, "llama", **{**BASE, "num_hidden_layers": 24})
    adapters = _learning(model, without="norm")
    assert 100 * (adapters + 62 * 768) / 222_903_552 == pytest.approx(published, abs=5e-4)


def test_bitfit_on_berts_blocks_is_the_papers_count() -> None:
    """Ben Zaken et al. 2022: 102,912 on BERT-base (0.09 %), 768 of them a pooler's, which no causal model has."""
    bert = {"is_decoder": True, **BASE}
    words = ["method=bitfit", "method.exclude=['cls.*']"]
    assert _learning(_attached(words, "bert", **bert)) == 102_912 - 768
    subset = "['cls.*','*.key.*','*.value.*','*.output.*','*LayerNorm*']"
    assert _learning(_attached(["method=bitfit", f"method.exclude={subset}"], "bert", **bert)) == 46_080  # 0.04 %


def test_ssf_on_the_blocks_of_vit_b_is_the_papers_count() -> None:
    """Lian et al. 2022: 205,824 on ViT-B/16, 1,536 of them the patch embedding's; GPT-NeoX has the same blocks."""
    assert _learning(_attached(["method=ssf"], "gpt_neox", **BASE)) == 205_824 - 1_536
