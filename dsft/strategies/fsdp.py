"""Fully sharded data parallel (torch's FSDP2), over one mesh axis or two (HSDP: replicate x shard)."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from dsft.comm.world import World, group_of_one
from dsft.grouped import computes
from dsft.moved import back, forth, move, moved
from dsft.protocols import Anatomy
from dsft.strategies.update import OnTensors
from dsft.strategy import Shape, Shares

EVEN = 1.1
"""Times an even share that the fullest rank may hold of a stack of matrices before another dimension is shared out."""


@dataclass(kw_only=True)
class FSDP(OnTensors):
    """One group per block, one for the rest (so that a tied embedding and head stay together).

    FSDP2 averages gradients over the ranks; the loss is multiplied by their number instead of setting the divide
    factor, which gloo refuses.
    """

    shards_blocks = True

    reshard: bool
    keep_unsharded: bool
    offload: Literal["none", "parameters"]
    shard_size: int | Literal["node"] | None
    root: FSDPModule = field(init=False, repr=False)
    dims: dict[nn.Parameter, int] = field(init=False, repr=False)
    ranks: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse groups of no rank."""
        if isinstance(self.shard_size, int) and self.shard_size < 1:
            raise ValueError(f"strategy.shard_size must be 1 or more, got {self.shard_size}")

    def data_ranks(self, world: World) -> int:
        """All of them: replicas and shards alike see different examples."""
        return world.size

    def home(self, world: World) -> torch.device:
        """Host memory if parameters are offloaded: FSDP2 moves them itself."""
        return torch.device("cpu") if self.offload == "parameters" else world.device

    def shares(self, size: int) -> Shares:
        """One of the shards of each."""
        part = 1 / self._shards(size)
        names = ("weights", "values", "gradients", "moments")
        return Shares(part, part, part, part, part, on_host=names if self.offload == "parameters" else ())

    def excess(self, shape: Sequence[int], size: int, *, movable: bool) -> float:
        """Return more than 1 where the dimension that is shared out does not divide: the last shards are smaller."""
        shards = self._shards(size)
        return _excess(shape[_dimension(shape, shards, movable=movable)], shards) if shape else float(shards)

    def gathered(self, blocks: Sequence[int], rest: int) -> int:
        """What is no block, the block in use and the one that is fetched ahead; without resharding, all."""
        return rest + sum(sorted(blocks)[-2:] if self._reshards else blocks)

    def _shards(self, size: int) -> int:
        if self.shard_size == "node":
            return int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        return self.shard_size or size

    @property
    def _reshards(self) -> bool:
        return self.reshard and not self.keep_unsharded

    def mesh(self, world: World) -> DeviceMesh:
        """One axis `shard`, or two: `replicate`, `shard`."""
        group_of_one()
        kind = world.device.type
        if self.shard_size is None:
            return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
        shard = self._shards(world.size)
        return init_device_mesh(kind, (world.size // shard, shard), mesh_dim_names=("replicate", "shard"))

    def shard(self, model: nn.Module, anatomy: Anatomy, world: World, precision: str) -> nn.Module:
        """Shard each block, then the rest. In bf16, gathered parameters are bf16 and gradients are reduced in fp32.

        Parameters of a group with packed ones are gathered as they are stored: see _policy.
        """
        offload = (
            CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if self.offload != "none" else OffloadPolicy()
        )
        mesh = self.mesh(world)
        shards = mesh.size(mesh.ndim - 1)
        place = partial(_placement, shards)
        move_uneven(model, shards)
        blocks = [model.get_submodule(name) for name in anatomy.blocks]
        inside = {param for block in blocks for param in block.parameters()}
        rest = [param for param in model.parameters() if param not in inside]
        with bytes_that_do_not_learn():
            for block in blocks:
                policy = _policy(block.parameters(), precision)
                fully_shard(
                    block,
                    mesh=mesh,
                    reshard_after_forward=self._reshards,
                    mp_policy=policy,
                    offload_policy=offload,
                    shard_placement_fn=place,
                )
            # The rest ends the forward pass and begins backward: what is freed between is gathered again at once.
            policy = _policy(rest, precision)
            fully_shard(
                model,
                mesh=mesh,
                reshard_after_forward=False,
                mp_policy=policy,
                offload_policy=offload,
                shard_placement_fn=place,
            )
        self.root, self.ranks = cast(FSDPModule, model), world.size
        found = [(module._parameters[key], dim) for module in model.modules() for key, dim in moved(module).items()]
        self.dims = {param: dim for param, dim in found if param is not None}
        return model

    def full(self, param: nn.Parameter) -> Tensor:
        """See Strategy."""
        return back(super().full(param), self.dims.get(param, 0)).contiguous()

    def values(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """See Strategy."""
        return self._back(params, super().values(params))

    def gradients(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """See Strategy."""
        return self._back(params, super().gradients(params))

    def add_gradients(self, params: Sequence[nn.Parameter], more: Sequence[Tensor]) -> None:
        """See Strategy."""
        super().add_gradients(params, self._forth(params, more))

    def write(self, params: Sequence[nn.Parameter], new: Sequence[Tensor]) -> None:
        """See Strategy."""
        super().write(params, self._forth(params, new))

    def export_state(self) -> dict[str, Tensor]:
        """The live state; moved stacks as views of what they were."""
        return {key: back(value, self._dim(key, value.ndim)) for key, value in super().export_state().items()}

    def state_template(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Fresh tensors, of which the optimizer's become its own."""
        kept = {
            key: (forth(torch.empty(size, device="meta"), self._dim(key, len(size))).shape, dtype)
            for key, (size, dtype) in shapes.items()
        }
        made = super().state_template(kept)
        return {key: back(value, self._dim(key, value.ndim)) for key, value in made.items()}

    def import_state(self, state: dict[str, Tensor]) -> None:
        """Go on from it."""
        super().import_state({key: forth(value, self._dim(key, value.ndim)) for key, value in state.items()})

    def _dim(self, key: str, ndim: int) -> int:
        """Dimension that is kept first of the tensor KEY/NAME of a state; 0 for what has not its parameter's shape."""
        param = self.update.named.get(key.partition("/")[2])
        return self.dims.get(param, 0) if param is not None and param.ndim == ndim else 0

    def _back(self, params: Sequence[nn.Parameter], found: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(params, found, strict=True)
        return [back(value, self.dims.get(param, 0)).contiguous() for param, value in pairs]

    def _forth(self, params: Sequence[nn.Parameter], given: Sequence[Tensor]) -> list[Tensor]:
        return [forth(value, self.dims.get(param, 0)) for param, value in zip(params, given, strict=True)]

    def used(self, model: nn.Module, path: str, names: Sequence[str]) -> dict[str, Tensor]:
        """By the all-gather of forward, with its casts; full_tensor would gather without them."""
        words = path.split(".")
        around = [model.get_submodule(".".join(words[:count])) for count in range(len(words) + 1)]
        group = [module for module in around if isinstance(module, FSDPModule)][-1]
        group.unshard()
        found = {name: around[-1].get_parameter(name).detach().to("cpu", copy=True) for name in names}
        group.reshard()
        return found

    def rest(self) -> None:
        """Each rank keeps its shards alone: else a module that is still gathered shows its copies, perhaps in bf16."""
        for module in cast(nn.Module, self.root).modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate; each micro-batch's gradients are reduced and sharded at once, so that none is kept whole."""
        self.root.set_is_last_backward(last)
        self.root.set_reshard_after_backward(last or not self.keep_unsharded)
        (loss * self.ranks).backward()  # type: ignore[no-untyped-call]


def _dimension(shape: Sequence[int], shards: int, *, movable: bool) -> int:
    """The dimension that is shared out: the first, unless a stack of matrices is uneven there and less so in another.

    Eight experts on 16 ranks would be one for each of eight ranks, and nothing for the others. movable: the stack may
    be kept with any dimension first; FSDP2 takes another than the first only where it divides.
    """
    if len(shape) < 3 or _excess(shape[0], shards) <= EVEN:
        return 0
    able = [dim for dim in range(len(shape)) if dim == 0 or movable or shape[dim] % shards == 0]
    return min(able, key=lambda dim: (_excess(shape[dim], shards), dim))


def move_uneven(model: nn.Module, shards: int) -> None:
    """Keep stacks of matrices with the dimension first that is shared out, where FSDP2 takes it nowhere else."""
    shared: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the old ones, so that no id is used again
    for module in filter(computes, model.modules()):
        dims = {}
        for name, param in module.named_parameters(recurse=False):
            dim = _dimension(param.shape, shards, movable=True)
            if dim and param.shape[dim] % shards:
                dims[name] = dim
        if dims:
            move(module, dims, shared)


def _excess(rows: int, shards: int) -> float:
    return -(-rows // shards) * shards / rows if rows else 1.0


def _placement(shards: int, param: nn.Parameter) -> Shard | None:
    """Answer fully_shard for one parameter, moved already; None stands for its first dimension."""
    dim = _dimension(param.shape, shards, movable=False)
    return Shard(dim) if dim else None


def _policy(params: Iterable[nn.Parameter], precision: str) -> MixedPrecisionPolicy:
    """In bf16: gather these parameters of one group in bf16, reduce in fp32; as stored if one of them is no float.

    torch 2.11 casts every parameter of a group to its param_dtype, uint8 too (2.13 leaves those), which would round
    packed bytes. All that its public API can say is no cast for the group; autocast then casts at each use, as under
    other strategies. What learns beside packed weights is small, and its frozen floats are bf16 already.
    """
    if precision != "bf16":
        return MixedPrecisionPolicy()
    floats = all(param.is_floating_point() for param in params)
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16 if floats else None, reduce_dtype=torch.float32)


class _Modules:
    """torch.nn, whose Parameter does not ask a tensor that is no float to learn."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)

    @staticmethod
    def Parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:  # noqa: N802
        return nn.Parameter(data, requires_grad and data.is_floating_point())


@contextmanager
def bytes_that_do_not_learn() -> Iterator[None]:
    """Let fully_shard take parameters that are no floats, as packed ones, also by torch 2.11.

    That one makes each shard a parameter that learns before it says that it does not, which torch refuses of integers;
    2.13 says so at once. Nothing public leaves the first call out.
    """
    if torch.__version__ >= "2.13":
        yield
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    module: Any = _fsdp_param
    module.nn = _Modules()
    try:
        yield
    finally:
        module.nn = nn
