"""From meta to values: module by module, each rank reading and keeping only what it owns.

Works on plain parameters, on FSDP2's DTensors (one or two mesh axes) and with DeepSpeed ZeRO-3, whose place()
partitions a module as soon as it is filled.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from dsft_launchers.shown import in_a_line
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dsft.comm.world import World
from dsft.models.transients import returned_at_once
from dsft.models.values import Values, matrices
from dsft.moved import forth, moved, shape_before
from dsft.packed import PackedWeight, packed_weights

Initial = Callable[[str, Tensor], Tensor]
"""(full name, parameter on meta) -> its first value, whole, on CPU."""


@torch.no_grad()
def materialize(
    model: nn.Module,
    values: Values,
    world: World,
    *,
    origins: Mapping[str, str],
    initial: Initial,
    place: Callable[[nn.Module], None],
) -> None:
    """Give every parameter and buffer of model that is on meta its value on world.device; identities are kept.

    origins: current name -> name in the base, for parameters, buffers and packed weights (see Lineage); what it does
    not name is new and comes from initial. place(module) is called for each module once its own tensors are whole.
    Peak host memory above the shard: two of the largest tensors. Raises RuntimeError for a buffer of unknown value, and
    for a parameter that is not on meta without having been filled here.
    """
    if values.unexpected and world.rank == 0:
        count, first = len(values.unexpected), values.unexpected[0]
        said = f"warning: model.path holds {count} tensor(s) that the model does not use, first {first}"
        sys.stderr.write(f"{in_a_line(said)}\n")
    filled: set[int] = set()
    with returned_at_once():
        owner = model
        for path, module in list(model.named_modules()):
            owner = module if hasattr(module, "_init_weights") else owner
            names = {key: f"{path}.{key}" if path else key for key in (*module._parameters, *module._buffers)}
            _fill_buffers(module, owner, names, values, world, origins=origins, initial=initial)
            packed = _packed(module, path, values, world, origins)
            for key, param in module._parameters.items():
                if param is None or id(param) in filled:  # the other end of a tie
                    continue
                name, dim = names[key], moved(module).get(key, 0)
                _require_meta(param, name)
                filled.add(id(param))
                if key in packed:
                    _set(param, packed.pop(key), world.device)
                elif name in origins and origins[name] in values:
                    _fill(param, world.device, values, origins[name], dim)
                else:
                    like = torch.empty(shape_before(param, dim), device="meta") if dim else param
                    _set(param, forth(initial(name, like), dim), world.device)
            place(module)


def _require_meta(tensor: Tensor, name: str) -> None:
    """What has a value already has it from nowhere that is known: no folder, no seed, and another one on each rank."""
    if not tensor.is_meta:
        raise RuntimeError(
            f"{name} has a value before the weights are read, of which nobody knows whose it is: this model cannot be "
            "built on meta"
        )


def _packed(
    module: nn.Module, path: str, values: Values, world: World, origins: Mapping[str, str]
) -> dict[str, Tensor]:
    """The bytes of a module's packed weights by parameter name, of stacks those that this rank keeps; else nothing."""
    found: dict[str, Tensor] = {}
    for key, weight in packed_weights(module).items():
        if any(module.get_parameter(part).is_meta for part in weight.parts):
            name = f"{path}.{key}" if path else key
            assert name in origins, f"origins must name the base weight of the packed {name}"
            wanted = _wanted(module, weight)
            found |= weight.pack(matrices(values, origins[name], weight, world.device, wanted), wanted.start)
    return found


def _wanted(module: nn.Module, weight: PackedWeight) -> range:
    """Numbers of the matrices of a stack of which this rank keeps a byte; of a linear its one."""
    count = weight.shape[0] if len(weight.shape) == 3 else 1
    first, last = count, 0
    for part in weight.parts if count > 1 else ():
        param = module.get_parameter(part)
        start, stop = 0, param.numel()
        if isinstance(param, DTensor):
            shape, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
            start, stop = offsets[0], offsets[0] + shape[0]
        piece = param.numel() // count
        if stop > start:
            first, last = min(first, start // piece), max(last, -(-stop // piece))
    return range(1) if count == 1 else range(min(first, last), last)


def _fill(param: nn.Parameter, device: torch.device, values: Values, name: str, dim: int) -> None:
    """Read this rank's part of a base tensor straight into the parameter. dim: which of the base's is kept first."""
    local, offsets = _allocate(param, device)
    if local.numel() == 0:
        return
    if not dim and tuple(local.shape[1:]) == tuple(param.shape[1:]):
        values.fill(name, local, offsets[0] if offsets else 0)
    else:
        local.copy_(_part(forth(values.full(name), dim), local, offsets))


def _set(param: nn.Parameter, full: Tensor, device: torch.device) -> None:
    """Keep this rank's part of a whole value."""
    assert full.shape == param.shape, (full.shape, param.shape)
    local, offsets = _allocate(param, device)
    local.copy_(_part(full, local, offsets))


def _allocate(param: nn.Parameter, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """Give a meta parameter memory, in place (ties and FSDP2's own references hold); its local part and where that is.

    Swapping is what nn.Module.to_empty does for DTensors; the attributes set on the parameter come along.
    """
    offsets: tuple[int, ...] = (0,) * param.ndim
    whole = torch.empty_like(param, device=device)
    local = whole
    if isinstance(whole, DTensor):
        local = whole.to_local()
        shape, offsets = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
        assert tuple(shape) == tuple(local.shape), (shape, local.shape)
    real = nn.Parameter(whole, requires_grad=param.requires_grad)
    for key, value in param.__dict__.items():
        real.__dict__.setdefault(key, value)
    torch.utils.swap_tensors(param, real)
    return local, tuple(offsets)


def _part(full: Tensor, local: Tensor, offsets: tuple[int, ...]) -> Tensor:
    return full[tuple(slice(first, first + size) for first, size in zip(offsets, local.shape, strict=True))]


def _fill_buffers(
    module: nn.Module,
    owner: Any,
    names: Mapping[str, str],
    values: Values,
    world: World,
    *,
    origins: Mapping[str, str],
    initial: Initial,
) -> None:
    """Buffers of the checkpoint are read, new ones come from initial, the others the library computes again."""
    computed = []
    for key, buffer in module._buffers.items():
        if buffer is None:
            continue
        name = names[key]
        if name in origins and origins[name] in values:
            _require_meta(buffer, name)
        if not buffer.is_meta:
            continue
        if name in origins and origins[name] not in values:
            computed.append(key)
            continue
        value = values.full(origins[name], world.device) if name in origins else initial(name, buffer)
        module._buffers[key] = value.to(world.device, buffer.dtype)
    if computed:
        _compute_buffers(module, owner, computed, world.device)


def _compute_buffers(module: nn.Module, owner: Any, keys: list[str], device: torch.device) -> None:
    """Non-persistent buffers (rotary frequencies), as transformers itself computes them after loading.

    It is asked twice, over zeros and over ones: what differs it has left untouched, and its value is unknown.
    """
    for param in module.parameters():
        param._is_hf_initialized = True  # type: ignore[attr-defined]
    found: list[dict[str, Tensor]] = []
    for start in (0, 1):
        for key in keys:
            meta = module._buffers[key]
            assert meta is not None
            module._buffers[key] = torch.full_like(meta, start, device=device)
        if hasattr(owner, "_init_weights"):
            owner._init_weights(module)
        found.append({key: buffer for key, buffer in module._buffers.items() if key in keys and buffer is not None})
    unknown = [key for key in keys if not torch.equal(found[0][key], found[1][key])]
    if unknown:
        raise RuntimeError(
            f"{type(module).__name__} has a buffer {unknown[0]} that is in no checkpoint and that transformers does "
            "not compute anew: this model cannot be built on meta"
        )
