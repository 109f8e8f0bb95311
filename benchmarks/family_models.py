"""Small random models of every causal language model class that transformers has, each in a folder of its own.

The shape of a model is the default configuration of its model_type, with what family_shapes.py says of it, made small
(dsft/models/small.py).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.family_shapes import CHANGES, VARIANTS, Kind
from dsft.models.build import build_meta
from dsft.models.bytes_tokenizer import byte_tokenizer
from dsft.models.files import ModelFiles
from dsft.models.small import NoCopyError, fill, small_copies, still

VOCABULARY = 264
"""Rows of an embedding: the bytes, four special tokens, and a multiple of 8."""


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
            still(config)
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
                for training in (False, True):  # some classes take another path in evaluation
                    model.train(training)(input_ids=torch.arange(3, 43)[None], use_cache=False)
        except Exception as error:  # of any class, over sizes that do not fit together
            failed = error
            continue
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return
    raise NoCopyError("no copy computes") from failed
