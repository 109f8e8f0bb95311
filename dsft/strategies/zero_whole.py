"""Whole values and gradients of a ZeRO run, in one collective for all; and back into each rank's part, without any."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsft.strategies.whole import gather


def values(params: Sequence[nn.Parameter]) -> list[Tensor]:
    """fp32 masters."""
    if _divided(params):
        return _gathered(params, _utils().safe_get_local_fp32_param)
    return _summed(params, lambda mapping, param: mapping.get_hp_fragment())


def gradients(params: Sequence[nn.Parameter]) -> list[Tensor]:
    """After the last backward, before the step."""
    if _divided(params):
        return _gathered(params, _utils().safe_get_local_grad)
    return _summed(params, _gradient_fragment)


def add_gradients(params: Sequence[nn.Parameter], more: Sequence[Tensor]) -> None:
    """Of whole tensors, each rank adds its own part."""
    for param, value in zip(params, more, strict=True):
        if hasattr(param, "ds_shape"):
            _utils().safe_set_local_grad(param, _utils().safe_get_local_grad(param) + _partition(param, value))
        elif (mapping := _mapping(param)) is not None:
            fragment = _gradient_fragment(mapping, param)
            fragment.add_(_fragment(mapping, value).view_as(fragment))


def write(params: Sequence[nn.Parameter], new: Sequence[Tensor]) -> None:
    """The master's part, and the value that forward uses."""
    for param, value in zip(params, new, strict=True):
        if hasattr(param, "ds_shape"):
            piece = _partition(param, value)
            _utils().safe_set_local_fp32_param(param, piece)
            param.ds_tensor.copy_(piece)  # type: ignore[attr-defined]  # divided as between steps
        else:
            _utils().safe_set_full_fp32_param(param, value)
            param.data.copy_(value)


def _divided(params: Sequence[nn.Parameter]) -> bool:
    """Stage 3 has divided them."""
    return hasattr(params[0], "ds_shape")


def _gathered(params: Sequence[Any], piece: Callable[[Any], Tensor]) -> list[Tensor]:
    lengths = [int(param.ds_tensor.numel()) for param in params]
    return gather([piece(param).flatten() for param in params], lengths, [param.ds_shape for param in params], None)


def _summed(params: Sequence[nn.Parameter], piece: Callable[[Any, Any], Tensor]) -> list[Tensor]:
    """Stages 1 and 2 keep flat partitions that end inside of a parameter: zeros elsewhere, added up."""
    flat = torch.zeros(sum(param.numel() for param in params), device=params[0].device)
    parts = flat.split([param.numel() for param in params])
    for param, target in zip(params, parts, strict=True):
        if (mapping := _mapping(param)) is not None:
            _fragment(mapping, target).copy_(piece(mapping, param).flatten())
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    return [part.view(param.shape) for part, param in zip(parts, params, strict=True)]


def _mapping(param: Any) -> Any:
    """Where this rank's part of param is, None if it has none."""
    return param._hp_mapping


def _fragment(mapping: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole value, flat; a view where value is flat."""
    address = mapping.lp_fragment_address
    return value.flatten().narrow(0, address.start, address.numel)


def _gradient_fragment(mapping: Any, param: Any) -> Tensor:
    fragment: Tensor = mapping.get_lp_grad_fragment(param._index_in_param_group)
    return fragment


def _partition(param: Any, value: Tensor) -> Tensor:
    """This rank's part under stage 3, padded with zeros as DeepSpeed's."""
    length = int(param.ds_tensor.numel())
    rank = dist.get_rank() if dist.is_initialized() else 0
    piece = value.flatten()[rank * length :][:length]
    return torch.nn.functional.pad(piece, (0, length - piece.numel()))


def _utils() -> Any:
    return importlib.import_module("deepspeed").utils
