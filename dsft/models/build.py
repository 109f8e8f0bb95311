"""A model of the right shape on meta: nothing allocated, nothing read."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsft.models import attention as ragged
from dsft.models.randomness import still
from dsft.models.recording import record_spans
from dsft.models.rope import own_lengths
from dsft.models.spans import UnheldError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dsft.models.files import ModelFiles


class OwnAttentionError(UnheldError):
    """The class of a model computes attention itself, and not through transformers' AttentionInterface."""


def build_meta(files: "ModelFiles", dtype: torch.dtype, attention: str | None = ragged.NAME) -> "PreTrainedModel":
    """The causal language model of files.config on meta, its parameters in dtype, without a key-value cache.

    attention: dsft's ragged attention, or a name that transformers knows; None is the family's own, of torch's kernels
    where they compute it. Raises ValueError if transformers has no causal language model of this type;
    OwnAttentionError if it cannot exchange its attention, and UnheldError if that cannot be computed for examples
    packed in a row. What draws random numbers that no example can bring is 0 (randomness.py).
    """
    if attention == ragged.NAME:
        ragged.register()
    try:
        model = _described(files, dtype, attention)
    except Exception as error:  # transformers' own, and whatever a model's own code raises
        if attention == ragged.NAME and _can_be_built(files, dtype):
            raise _unrouted(files, str(files.config.model_type)) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model {files.name_or_path} must be a causal language model that transformers can build with "
            f"{attention or 'its own'} attention, got model_type={files.config.model_type}: {reason}"
        ) from error
    if attention == ragged.NAME and not type(model)._can_set_attn_implementation():
        raise _unrouted(files, type(model).__name__)
    model.config.use_cache = False
    if attention == ragged.NAME:
        record_spans(model)
        own_lengths(model, ragged.NAME)
    return model


def _described(files: "ModelFiles", dtype: torch.dtype, attention: str | None) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(files.config)
    still(config)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=files.trust_remote_code
        )
    return model


def _can_be_built(files: "ModelFiles", dtype: torch.dtype) -> bool:
    """True if the model can be built with its family's own attention."""
    try:
        _described(files, dtype, None)
    except Exception:  # the caller reports the error of its own attempt, which is the same
        return False
    return True


def _unrouted(files: "ModelFiles", kind: str) -> OwnAttentionError:
    return OwnAttentionError(
        f"model {files.name_or_path} must route its attention through transformers' AttentionInterface, got {kind}, "
        "which does not: its examples cannot share a row"
    )


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or persistent buffer, every name of a tied one included."""
    return dict(model.state_dict(keep_vars=True))
