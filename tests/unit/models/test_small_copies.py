"""Small copies of configurations: sizes per layer are made small too, and what cannot be built says why."""

from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from transformers import AutoConfig

from dsft.engine.trial import examine
from dsft.models.anatomy import dissect
from dsft.models.build import build_meta
from dsft.models.files import ModelFiles
from dsft.models.small import NoCopyError, small_copies

OLDER = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.23"), reason="this configuration is another one, or none, before 5.23"
)


def _files(model_type: str, **changed: object) -> ModelFiles:
    return ModelFiles(
        config=AutoConfig.for_model(model_type, **changed), folder=None, name_or_path="m", init="random",
        revision=None, trust_remote_code=False,
    )  # fmt: skip


def test_sizes_that_a_configuration_keeps_by_layer_are_made_small() -> None:
    sizes = {str(layer): {"head_dim": 128, "num_attention_heads": 32} for layer in range(32)}
    files = _files("llama", of_each_layer=sizes)
    copy = next(small_copies(files.config, lambda config: build_meta(_of(files, config), torch.float32)))
    width, heads = copy.hidden_size // copy.num_attention_heads, copy.num_attention_heads
    assert width < 128
    assert copy.of_each_layer == {str(layer): {"head_dim": width, "num_attention_heads": heads} for layer in range(2)}


def _of(files: ModelFiles, config: object) -> ModelFiles:
    return ModelFiles(**{**vars(files), "config": config})


ZAMBA = {"num_hidden_layers": 20, "layers_block_type": [*["linear_attention"] * 4, "hybrid"] * 4}
"""Blocks of the second kind share their weights, and each has a list of adapters, one for each of these blocks."""


@pytest.mark.parametrize(
    ("model_type", "changed", "most"),
    [pytest.param("longcat_flash", {}, 2, marks=OLDER), ("prophetnet", {}, 2), ("zamba2", ZAMBA, 10)],
)
def test_a_copy_is_no_deeper_than_its_kinds_of_blocks_ask_for(
    model_type: str, changed: dict[str, object], most: int
) -> None:
    files = _files(model_type, **changed)
    copy = next(small_copies(files.config, lambda config: build_meta(_of(files, config), torch.float32, "eager")))
    assert len(dissect(build_meta(_of(files, copy), torch.float32, "eager")).blocks) <= most


def test_a_vocabulary_that_is_asked_for_is_taken() -> None:
    files = _files("llama")
    copies = small_copies(files.config, lambda config: build_meta(_of(files, config), torch.float32), vocabulary=264)
    assert next(copies).vocab_size == 264


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("bart", "model must be causal, got BartForCausalLM, an encoder, "),
        pytest.param("musicgen", "got Musicgen (musicgen): ValueError: Multiple valid text configs ", marks=OLDER),
        ("blt", "got Blt (blt): AttributeError: 'BltConfig' object has no attribute 'num_hidden_layers'"),
        ("nemotron", "model m must be a causal language model that transformers can build "),
    ],
)
def test_a_configuration_of_which_no_copy_can_be_built_is_refused_with_the_reason(model_type: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^model m") as refused:
        examine(_files(model_type))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not isinstance(refused.value.__cause__, NoCopyError)
