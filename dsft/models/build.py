"""A model of the right shape on meta: nothing allocated, nothing read."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsft.models import attention as ragged
from dsft.models.small import still

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dsft.models.files import ModelFiles


class OwnAttentionError(ValueError):
    """The class of a model computes attention itself, and not through transformers' AttentionInterface."""


def build_meta(
    files: "ModelFiles", dtype: torch.dtype, attention: str = ragged.NAME, stilled: Sequence[str] = ()
) -> "PreTrainedModel":
    """The causal language model of files.config on meta, its parameters in dtype, without a key-value cache.

    attention: dsft's ragged attention, or a name that transformers knows ("sdpa" to generate). stilled: settings that
    become 0, see Family. Raises ValueError if transformers has no causal language model of this type, or the model
    cannot exchange its attention.
    """
    from transformers import AutoModelForCausalLM

    if attention == ragged.NAME:
        ragged.register()
    config = copy.deepcopy(files.config)
    still(config, stilled)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=files.trust_remote_code
            )
    except Exception as error:  # transformers' own, and whatever a model's own code raises
        if attention == ragged.NAME and isinstance(error, KeyError) and error.args == (ragged.NAME,):
            raise OwnAttentionError(_own(files, config.model_type)) from error  # a class for each name that it knows
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model {files.name_or_path} must be a causal language model that transformers can build with "
            f"{attention} attention, got model_type={config.model_type}: {reason}"
        ) from error
    if attention == ragged.NAME and not type(model)._can_set_attn_implementation():
        raise OwnAttentionError(_own(files, type(model).__name__))
    model.config.use_cache = False
    return model


def _own(files: "ModelFiles", name: str) -> str:
    return (
        f"model {files.name_or_path} must route its attention through transformers' AttentionInterface, got {name}, "
        "which does not: its examples cannot share a row"
    )


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or persistent buffer, every name of a tied one included."""
    return dict(model.state_dict(keep_vars=True))
