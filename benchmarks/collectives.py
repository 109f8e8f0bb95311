"""What a step hands to its collectives: counted while it runs, in a real group or in a fake one, and by closed forms.

A fake group (torch's backend of that name) is one process that plays rank 0 of many: nothing is sent, and what others
would have given is a copy of its own.
"""

import math
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsft.comm.world import World
from dsft.engine.assemble import Skeleton

KINDS = {"allgather": "all-gather", "reducescatter": "reduce-scatter", "allreduce": "all-reduce"}
"""Part of an operator's name -> what is told; other collectives keep their own name."""

NUMBERS = 8192
"""Bytes up to which what is neither gathered nor scattered are numbers: a count, a loss, the norm of each tensor."""

Volume = dict[str, list[int]]
"""Collective -> [calls, bytes]. Bytes are the whole of a call: what an all-gather gives, what the others are given."""


class Counted(TorchDispatchMode):
    """Within it, each collective of this process is noted in found, by kind and number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Volume = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again in plain tensors, with its collectives
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and (ranks := _ranks(args)):
            name = func._schema.name.partition("::")[2].replace("_", "")
            kind = next((told for part, told in KINDS.items() if part in name), name)
            size = max(_nbytes(part) for part in (*args, out))
            small = " of numbers" if size <= NUMBERS and kind not in ("all-gather", "reduce-scatter") else ""
            entry = self.found.setdefault(f"{kind}{small} x{ranks}", [0, 0])
            entry[0] += 1
            entry[1] += size
        return out


def _nbytes(part: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(part) if isinstance(leaf, Tensor))


def _ranks(args: Iterable[Any]) -> int:
    """Number of ranks in the group that an operator was called on; 0 if it takes none, as one that only waits."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).size()
    names = [arg for arg in args if isinstance(arg, str)]  # the reduction, the group
    return dist.distributed_c10d._resolve_process_group(names[-1]).size() if names else 0


def fake_world(size: int) -> World:
    """Rank 0 of size, alone. What composes a run is told of size ranks too. leave() ends it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    os.environ |= {"RANK": "0", "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    return World(0, size, 0, torch.device("cpu"))


def closed_form(
    bones: Skeleton, strategy: str, precision: str, *, size: int, shards: int, micro_batches: int, kept: bool
) -> dict[str, int]:
    """Bytes of a step by collective, as in Volume, without those of numbers; shards: ranks of a copy, for hsdp.

    ddp: what learns, once. fsdp, hsdp: each micro-batch gathers a block in forward and in backward, all else (embedding
    and head, which the one ends and the other begins with) once, and reduces what learns; kept (keep_unsharded): a step
    gathers all once. Each rank has equally many of a tensor's rows, which are filled up to that. hsdp: the copies then
    sum what a shard got. zero3: each micro-batch gathers all once (a model below stage3_max_live_parameters stays until
    backward), and reduces what learns; a tensor's elements are filled up.
    """
    params = list(bones.model.parameters())
    learning = [param for param in params if param.requires_grad]
    if strategy == "ddp":
        return {f"all-reduce x{size}": sum(param.nbytes for param in learning)}
    if strategy == "zero3":
        return {
            f"all-gather x{size}": micro_batches
            * sum(_filled(param.numel(), size) * param.itemsize for param in params),
            f"reduce-scatter x{size}": micro_batches * sum(_filled(param.numel(), size) * 4 for param in learning),
        }
    whole = {id(param): _filled(len(param), shards) * param[0].numel() for param in params}
    width = 2 if precision == "bf16" else 4  # what learns is gathered in the precision of forward, reduced in fp32
    blocks = [param for name in bones.anatomy.blocks for param in bones.model.get_submodule(name).parameters()]
    again = sum(whole[id(param)] for param in blocks)
    gathered = sum(whole.values()) if kept else micro_batches * (sum(whole.values()) + again)
    reduced = micro_batches * sum(whole[id(param)] * 4 for param in learning)
    found = {
        f"all-gather x{shards}": gathered * width,
        f"reduce-scatter x{shards}": reduced,
    }
    return found | ({f"all-reduce x{size // shards}": reduced // shards} if strategy == "hsdp" else {})


def _filled(count: int, ranks: int) -> int:
    return math.ceil(count / ranks) * ranks


def on_rings(volume: Volume) -> float:
    """Bytes that a rank sends if all-gather and reduce-scatter go round a ring, and all-reduce is one after the other.

    Of g ranks, each sends (g - 1) / g of the whole; twice that in an all-reduce.
    """
    sent = 0.0
    for name, (_, nbytes) in volume.items():
        kind, _, ranks = name.rpartition(" x")
        sent += nbytes * (1 - 1 / int(ranks)) * (2 if kind.startswith("all-reduce") else 1)
    return sent
