"""A model of the right shape on meta: nothing allocated, nothing read."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsft.models import attention as ragged
from dsft.models.randomness import still

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dsft.models.files import ModelFiles


def build_meta(files: "ModelFiles", dtype: torch.dtype, attention: str = ragged.NAME) -> "PreTrainedModel":
    """The causal language model of files.config on meta, its parameters in dtype, without a key-value cache.

    attention: dsft's ragged attention, to train, without the random numbers that no example can bring (randomness.py);
    or a name that transformers knows ("sdpa" to generate). Raises ValueError if
    transformers has no causal language model of this type, or the model cannot exchange its attention.
    """
    from transformers import AutoModelForCausalLM

    if attention == ragged.NAME:
        ragged.register()
    config = copy.deepcopy(files.config)
    if attention == ragged.NAME:
        still(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=files.trust_remote_code
            )
    except Exception as error:  # transformers' own, and whatever a model's own code raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model {files.name_or_path} must be a causal language model that transformers can build with "
            f"{attention} attention, got model_type={config.model_type}: {reason}"
        ) from error
    if attention == ragged.NAME and not type(model)._can_set_attn_implementation():
        raise ValueError(
            f"model {files.name_or_path} must route its attention through transformers' AttentionInterface, "
            f"got {type(model).__name__}, which does not: examples could not be packed; use another model"
        )
    model.config.use_cache = False
    return model


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or persistent buffer, every name of a tied one included."""
    return dict(model.state_dict(keep_vars=True))
