"""A model of the right shape on meta: nothing allocated, nothing read."""

import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dsft import grouped
from dsft.models import attention as ragged
from dsft.models import experts
from dsft.models.heads import name_labels, require_class
from dsft.models.numbers import NumbersError, check_numbers, check_sizes, said, without_warnings
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
    """The model of files.config on meta, its parameters in dtype, without a key-value cache: a causal language model,
    or the same with a head for sequences, where files have labels.

    attention: dsft's ragged attention, or a name that transformers knows; None is the family's own, of torch's kernels
    where they compute it. Raises ValueError if transformers has no causal language model of this type;
    OwnAttentionError if it cannot exchange its attention, and UnheldError if that cannot be computed for examples
    packed in a row. What draws random numbers that no example can bring is 0 (randomness.py).
    """
    if attention == ragged.NAME:
        ragged.register()
    if files.labels:
        require_class(files)
    try:
        model = _described(files, dtype, attention)
    except NumbersError as error:
        raise ValueError(
            f"model {files.name_or_path} must have numbers that fit together in its config.json: {error}; correct it"
        ) from error
    except Exception as error:  # transformers' own, and whatever a model's own code raises
        if attention == ragged.NAME and _can_be_built(files, dtype):
            raise _unrouted(files, str(files.config.model_type)) from error
        raise ValueError(
            f"model {files.name_or_path} must be a causal language model that transformers can build with "
            f"{attention or 'its own'} attention, got model_type={files.config.model_type}: "
            f"{said(files.config, error)}; correct its config.json, or take another model"
        ) from error
    if attention == ragged.NAME and not type(model)._can_set_attn_implementation():
        raise _unrouted(files, type(model).__name__)
    model.config.use_cache = False
    _put_on_meta(model)
    if attention == ragged.NAME:
        record_spans(model)
        own_lengths(model, ragged.NAME)
    return model


def _described(files: "ModelFiles", dtype: torch.dtype, attention: str | None) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = copy.deepcopy(files.config)
    still(config)
    check_numbers(config)
    loader: Any = AutoModelForSequenceClassification if files.labels else AutoModelForCausalLM
    if files.labels:
        name_labels(config, files.labels)
    with without_warnings(), torch.device("meta"):
        model: PreTrainedModel = loader.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=files.trust_remote_code
        )
    if model._can_set_experts_implementation():
        experts.register()
        model.set_experts_implementation(grouped.NAME)
    check_sizes(model)
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


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer of the model that its checkpoints hold, each once."""
    found = {id(tensor): (name, tensor) for name, tensor in reversed(base_tensors(model).items())}
    return {name: tensor for name, tensor in reversed(found.values()) if not isinstance(tensor, nn.Parameter)}


def _put_on_meta(model: nn.Module) -> None:
    """Put on meta what a checkpoint holds and torch made elsewhere: torch.normal heeds no default device.

    Its values are one process's draws; on meta it is read from the folder like the rest. Tensors that are tied stay so.
    A buffer that transformers keeps in fp32 whatever the model's type (a router's correction bias) gets that type.
    """
    strict: tuple[str, ...] = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for name, module, key, tensor in list(_kept(model)):
        dtype = tensor.dtype
        if key in module._buffers and dtype.is_floating_point and _named(name, strict):
            dtype = torch.float32
        if tensor.is_meta and dtype == tensor.dtype:
            continue
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device="meta", dtype=dtype)
            new = nn.Parameter(empty, requires_grad=tensor.requires_grad) if key in module._parameters else empty
            made[id(tensor)] = (tensor, new)  # with the old one, so that no id is used again
        place = module._parameters if key in module._parameters else module._buffers
        place[key] = made[id(tensor)][1]  # type: ignore[assignment]


def _kept(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(full name, module, key in it, tensor) of each parameter and persistent buffer, tied ones under every name."""
    for path, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield f"{path}.{key}" if path else key, module, key, tensor


def _named(name: str, patterns: tuple[str, ...]) -> bool:
    """True if transformers' loader would find one of these patterns in the name."""
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)
