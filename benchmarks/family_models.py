"""Small random models of every causal language model class that transformers has, each in a folder of its own.

The shape of a model is the default configuration of its model_type, made small (dsft/models/small.py). CHANGES says
what has to be different where a default describes no causal model or none that can be built; VARIANTS are further rows.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsft.models.build import build_meta
from dsft.models.bytes_tokenizer import byte_tokenizer
from dsft.models.files import ModelFiles
from dsft.models.small import fill, random_settings, small_copies, still

VOCABULARY = 264
"""Rows of an embedding: the bytes, four special tokens, and a multiple of 8."""

DECODER: Mapping[str, Any] = {"is_decoder": True}
"""What makes a causal model of a class that is an encoder by default."""


@dataclass(frozen=True)
class Kind:
    """One row. changes: of the default configuration; after: of its small copy; words: overrides of the run; drops: the
    dropouts of the configuration stay, so that plain transformers draws other numbers and is not compared.
    """

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    drops: bool = False


CHANGES: Mapping[str, Kind] = {
    name: Kind(name, DECODER)
    for name in (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
    )
}  # fmt: skip

VARIANTS: Mapping[str, Kind] = {
    "gpt2 with dropout": Kind("gpt2", drops=True),
    "llama tied": Kind("llama", {"tie_word_embeddings": True}),
}


def names() -> list[str]:
    """Every row: the model types of transformers that name a causal language model, then the variants."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def kind(name: str) -> Kind:
    """What the row of this name is."""
    return VARIANTS.get(name) or CHANGES.get(name) or Kind(name)


def config_of(name: str) -> Any:
    """The configuration of a row, of its full size. Raises what transformers raises for one that it cannot make."""
    from transformers import AutoConfig

    row = kind(name)
    return AutoConfig.for_model(row.model_type, **row.changes)


def small_config(name: str) -> Any | None:
    """The small copy of it, None if no copy can be built."""
    copies = small_copies(
        config_of(name), lambda one: build_meta(shape_of(name, one), torch.float32, "eager"), vocabulary=VOCABULARY
    )
    found = next(copies, None)
    if found is not None:
        for key, value in kind(name).after.items():
            setattr(found.get_text_config(), key, value)
        if not kind(name).drops:
            still(found, [key for key in random_settings(found) if "drop" in key])
    return found


def shape_of(name: str, config: Any) -> ModelFiles:
    """A model of which only the configuration is there."""
    return ModelFiles(
        config=config, folder=None, name_or_path=name, init="random", revision=None, trust_remote_code=False
    )


def make(name: str, folder: Path) -> bool:
    """Write the small model of a row into folder, with a tokenizer; False if its class cannot be built small."""
    if (folder / "tokenizer.json").is_file():
        return True
    from transformers import AutoModelForCausalLM

    config = small_config(name)
    if config is None:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return True
