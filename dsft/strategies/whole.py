"""Whole tensors from shards and shards from whole tensors; of many tensors at once, in one collective."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """DTensors, each sharded in one dimension, gathered together (collective); other tensors as they are."""
    if not tensors or not hasattr(tensors[0], "full_tensor"):
        return list(tensors)
    first: Any = tensors[0]
    group = first.device_mesh.get_group(first.device_mesh.ndim - 1)  # the last axis shards, one before it replicates
    size = dist.get_world_size(group)
    dims = [tensor.placements[-1].dim for tensor in cast("Sequence[Any]", tensors)]
    shapes = [
        torch.Size((tensor.shape[dim], *tensor.shape[:dim], *tensor.shape[dim + 1 :]))
        for tensor, dim in zip(tensors, dims, strict=True)
    ]
    lengths = [-(-shape[0] // size) * shape[1:].numel() for shape in shapes]
    pieces = [local(tensor).movedim(dim, 0).flatten() for tensor, dim in zip(tensors, dims, strict=True)]
    found = gather(pieces, lengths, shapes, group)
    return [each.movedim(0, dim).contiguous() for each, dim in zip(found, dims, strict=True)]


def gather(
    pieces: Sequence[Tensor], lengths: Sequence[int], shapes: Sequence[torch.Size], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Tensors of shapes, of each of which every rank has a flat piece: lengths elements, or fewer at its end.

    One collective over group (None: all ranks, or this process alone).
    """
    size = dist.get_world_size(group) if dist.is_initialized() else 1
    flat = pieces[0].new_zeros(sum(lengths))
    for target, piece in zip(flat.split(list(lengths)), pieces, strict=True):
        target[: piece.numel()].copy_(piece)
    everyone = flat[None]
    if size > 1:
        everyone = flat.new_empty(size, flat.numel())
        dist.all_gather(list(everyone), flat, group=group)
    columns = everyone.split(list(lengths), dim=1)
    return [part.reshape(-1)[: shape.numel()].view(shape) for part, shape in zip(columns, shapes, strict=True)]


def part_of(value: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's storage of like, and what of a whole value belongs there."""
    if not hasattr(like, "full_tensor"):
        return like.detach(), value
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = like
    shape, offsets = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    ranges = tuple(slice(first, first + length) for first, length in zip(offsets, shape, strict=True))
    return local(like), value[ranges]


def local(tensor: Tensor) -> Tensor:
    """This rank's storage of a DTensor; any other tensor as it is."""
    found: Any = tensor.detach()
    mine: Tensor = found.to_local() if hasattr(found, "full_tensor") else found
    return mine
