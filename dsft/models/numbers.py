"""A model's shape from the numbers of model.config: what transformers cannot build of them is refused in one line."""

import contextlib
import difflib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

FEW_TOKENS = 2
"""Tokens of the forward pass that is tried: two sequence positions show every product of shapes."""
_tried: set[str] = set()
"""Numbers, as JSON, of which this process has tried a forward pass: it takes a tenth of a second."""


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of configurations that hold the number of experts a router chooses from."""


class NumbersError(ValueError):
    """Numbers of a configuration that do not fit together, or that no size can be."""


def check_numbers(config: "PretrainedConfig") -> None:
    """Raise NumbersError for numbers that together, or as a size, are impossible and that no class refuses.

    The line names no file: whoever asks knows where the configuration is from.
    """
    numbers = config.get_text_config().to_dict()
    count = {key: value for key, value in numbers.items() if type(value) is int}
    heads, groups = count.get("num_attention_heads", 0), count.get("num_key_value_heads", 0)
    if heads > 0 and groups > 0 and heads % groups:
        raise NumbersError(f"num_key_value_heads must divide num_attention_heads={heads}, got {groups}")
    window = count.get("sliding_window", 1)
    if window < 1 and numbers.get("use_sliding_window") is not False:
        raise NumbersError(f"sliding_window must be 1 or more, or null, got {window}")
    for key in EXPERTS:
        there = count.get(key, 0)  # of one or none a dense model's configuration may say that two are chosen
        chosen = count.get("num_experts_per_tok", 1)
        if there > 1 and not 1 <= chosen <= there:
            raise NumbersError(f"num_experts_per_tok must be from 1 to {key}={there}, got {chosen}")


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Keep torch from warning of a tensor without a number while a model is built: check_sizes refuses it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
        yield


def check_sizes(model: "nn.Module") -> None:
    """Raise NumbersError for a model, on meta, of which a tensor has no number."""
    for name, param in model.named_parameters():
        if param.numel() == 0:
            raise NumbersError(f"every size must be 1 or more, got {name} of shape {tuple(param.shape)}")


def config_of(numbers: Mapping[str, Any]) -> "PretrainedConfig":
    """Return transformers' configuration of these numbers, of which one forward pass on meta was tried.

    Raises ValueError, one line that names model.config, if transformers knows no causal language model of that
    model_type, or cannot build or run one of these numbers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    kind = numbers.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(str(kind), list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), n=1, cutoff=0.6)
        way = f"; did you mean {near[0]}?" if near else "; such as llama, qwen3 or mixtral"
        raise ValueError(
            f"model.config.model_type must be a causal language model that transformers knows, got {kind!r}{way}"
        )
    rest = {key: value for key, value in numbers.items() if key != "model_type"}
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what it warns of before it fails is no second line of ours
    try:
        config: PretrainedConfig = AutoConfig.for_model(str(kind), **rest)
        if (same := json.dumps(numbers, sort_keys=True, default=repr)) in _tried:
            return config
        check_numbers(config)
        with without_warnings(), torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
            check_sizes(model)
            tokens, mask = (
                torch.zeros(1, FEW_TOKENS, dtype=torch.long),
                torch.zeros(1, 1, FEW_TOKENS, FEW_TOKENS).bfloat16(),
            )
            _forward(model, input_ids=tokens, attention_mask=mask, use_cache=False)
        _tried.add(same)
    except Exception as error:  # whatever transformers and torch raise: each is of these numbers
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"model.config must be numbers of which transformers can build a {kind} model, and it says: {reason}; "
            "correct them, or leave them at the YAML's"
        ) from error
    finally:
        logging.set_verbosity(before)
    return config


def _forward(model: Any, **inputs: Any) -> None:
    """Call the model on meta. Raises RuntimeError for shapes that do not fit; what else meta cannot do is no fault."""
    try:
        model(**inputs)
    except RuntimeError as error:
        if re.search(r"\b(shape|size)s?\b", str(error)):
            raise


def said(config: "PretrainedConfig", error: Exception) -> str:
    """Return what transformers says of a configuration in one line; of a word that it does not know, whose it is."""
    if isinstance(error, KeyError) and error.args:
        word = error.args[0]
        key = next((key for key, value in _values(config.to_dict()) if value == word), None)
        return f"{key}={word!r} is unknown to its class" if key else f"KeyError: {word!r}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _values(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Key and each value of a configuration, those of lists and of inner ones too."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _values(value)
        else:
            yield from ((key, each) for each in (value if isinstance(value, list) else [value]))
