"""A model's shape from the numbers of model.config: what transformers cannot build of them is refused in one line."""

import difflib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FEW_TOKENS = 2
"""Tokens of the forward pass that is tried: two sequence positions show every product of shapes."""
_tried: set[str] = set()
"""Numbers, as JSON, of which this process has tried a forward pass: it takes a tenth of a second."""


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
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
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
