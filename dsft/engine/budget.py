"""Memory per rank, estimated before anything is loaded."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dsft import grouped
from dsft.config import Run
from dsft.course import Course
from dsft.engine.assemble import Skeleton
from dsft.engine.optimizers import state_bytes
from dsft.engine.recompute import WAYS, Recompute, is_recomputed
from dsft.engine.saved import Saved, count_saved
from dsft.models.scoring import AT_ONCE
from dsft.packed import PackedWeight, packed_weights
from dsft.telemetry.meter import resident_bytes

CONTEXT = 2**29
"""What a CUDA context and its libraries take of a GPU, about."""

NCCL = 2**30
"""Estimated bytes of NCCL's buffers on each GPU of a run of several ranks: more with more peers. Not measured yet."""

EVER = 10**6
"""Steps of a run whose number is not known yet."""

LOOKS = 4
"""Whole copies of a part that live while a course looks at it: values, gradients, products one by one and together."""

SLACK = 3 * 2**28
"""What glibc's heap leaves unused between a step's tensors: 0.1 to 1.4 GB, benchmarks/results/memory.md."""


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank on the device that computes.

    weights: what is frozen, as it is stored; values, gradients, moments: of what learns (gradients: those beside
    activations); references: copies of what learns that an objective compares with; gathered: what sharding makes whole
    at a time; activations: of one micro-batch, None where they cannot be counted; working: the most that one block, the
    head or the update takes for itself; slack: what a CPU's heap wastes; process: what is there before, and for the
    links between ranks.
    """

    weights: int
    values: int
    gradients: int
    moments: int
    references: int
    gathered: int
    activations: int | None
    working: int
    slack: int
    process: int

    def as_dict(self) -> dict[str, int | None]:
        """The parts and their sum."""
        parts = asdict(self)
        return {**parts, "total": sum(part or 0 for part in parts.values())}


def estimates(run: Run, bones: Skeleton, ranks: int, *, accelerator: bool) -> dict[Recompute, Budget]:
    """The budget on so many ranks for each train.gradient_checkpointing; accelerator: the run computes on one."""
    saved = _saved(run, bones)

    def budget(way: Recompute) -> Budget:
        train = replace(run.train, gradient_checkpointing=way)
        return _estimate(replace(run, train=train), bones, saved, ranks, accelerator=accelerator)

    return {way: budget(way) for way in WAYS}


def estimate(run: Run, bones: Skeleton, ranks: int, *, accelerator: bool) -> Budget:
    """The budget of this run on so many ranks; accelerator: it computes on one."""
    return _estimate(run, bones, _saved(run, bones), ranks, accelerator=accelerator)


def _estimate(run: Run, bones: Skeleton, saved: Saved | None, ranks: int, *, accelerator: bool) -> Budget:
    model = bones.model
    learning = [param for param in model.parameters() if param.requires_grad]
    frozen = [param for param in model.parameters() if not param.requires_grad]
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    largest = max((4 * param.numel() for param in learning), default=0)
    shares = run.strategy.shares(ranks)
    stacks = [module for module in model.modules() if grouped.computes(module)]
    movable = {id(param) for module in stacks for param in module.parameters(recurse=False)}

    def fullest(sizes: Iterable[tuple[Tensor, int]]) -> float:
        return sum(
            size * run.strategy.excess(tensor.shape, ranks, movable=id(tensor) in movable) for tensor, size in sizes
        )

    ours = fullest((param, 4 * param.numel()) for param in learning)
    kept = {
        "weights": shares.weights * (fullest((param, param.nbytes) for param in frozen) + buffers),
        "values": shares.values * ours,
        "gradients": shares.gradients * ours,
        "moments": shares.moments * fullest((param, state_bytes(run.optim, param.shape)) for param in learning),
    }
    on_host = accelerator and "values" in shares.on_host
    references = (
        0 if on_host or run.objective.reference_cache else round(len(run.objective.roles) * shares.shown * ours)
    )
    course = run.method.course(bones.model, run.train.steps or EVER, torch.device("meta"))
    kept["moments"] += sum(tensor.nbytes for tensor in course.state.values()) if course else 0
    activations, working = _kept(saved, run) if saved else (None, 0)
    working += _unpacked(model)
    working = max(working, _head(bones, run.train.micro_batch_tokens))
    if accelerator and run.train.offload_activations and activations is not None:
        activations = 0  # one block's come back at a time: working has them
    if _one_micro_batch(run, ranks):
        most = kept["gradients"] if not run.optim.in_backward else min(kept["gradients"], largest)
        kept["gradients"] = max(0, most - (activations or 0))  # they come as activations go
    update = round(kept["values"]) if accelerator else 2 * largest  # on GPUs torch moves all parameters at once
    update += LOOKS * _shown(bones, course) if course else 0
    return Budget(
        **{name: 0 if accelerator and name in shares.on_host else round(value) for name, value in kept.items()},
        references=references,
        gathered=_gathered(run, bones),
        activations=activations,
        working=max(working, update - (activations or 0)),
        slack=0 if accelerator or saved is None else min(SLACK, sum(saved.blocks)),
        process=CONTEXT + NCCL * (ranks > 1) if accelerator else resident_bytes(),
    )


def _shown(bones: Skeleton, course: Course) -> int:
    """Bytes of the largest part that a course is shown, whole and in fp32."""
    return max(sum(4 * bones.model.get_parameter(name).numel() for name in part) for part in course.parts)


def _unpacked(model: nn.Module) -> int:
    """Bytes of the largest weight that is unpacked at a time; of a stack of experts, of so many experts."""
    packed = [weight for module in model.modules() for weight in packed_weights(module).values()]
    return max((weight.at_once * _matrix_bytes(weight) for weight in packed), default=0)


def _matrix_bytes(weight: PackedWeight) -> int:
    return math.prod(weight.shape[-2:]) * (weight.compute_dtype or weight.dtype).itemsize


def _one_micro_batch(run: Run, ranks: int) -> bool:
    """True if a step is surely one on each rank, so that no gradient waits for another."""
    examples = -(-run.train.global_batch_size // ranks)
    longest = run.train.max_length + run.method.positions
    surely: bool = examples * longest <= run.train.micro_batch_tokens
    return surely


def _gathered(run: Run, bones: Skeleton) -> int:
    """In the type that is computed in, bf16 or fp32, but for a block with packed weights."""
    computed = {"bf16": 2, "fp32": 4}[run.train.precision]

    def size(module: nn.Module) -> int:
        packed = any(packed_weights(inner) for inner in module.modules())
        width = 4 if packed else computed  # a group with bytes is gathered as it is stored
        return sum(param.numel() * min(width, param.element_size()) for param in module.parameters())

    blocks = [size(bones.model.get_submodule(name)) for name in bones.anatomy.blocks]
    whole: int = run.strategy.gathered(blocks, size(bones.model) - sum(blocks))
    return whole


def _saved(run: Run, bones: Skeleton) -> Saved | None:
    """What one micro-batch keeps: rows of train.max_length, and a shorter one to fill it."""
    train, before = run.train, run.method.positions
    whole, rest = divmod(train.micro_batch_tokens, train.max_length + before)
    lengths = (train.max_length,) * whole + ((max(1, rest - before),) if rest else ())
    return count_saved(bones.model, bones.anatomy, lengths, bf16=train.precision == "bf16")


def _kept(saved: Saved, run: Run) -> tuple[int, int]:
    """What lives from forward to backward, and the most that one block needs in its own backward."""
    kept, again = saved.rest, 0
    for index, (block, entry) in enumerate(zip(saved.blocks, saved.inputs, strict=True)):
        recomputed = is_recomputed(run.train.gradient_checkpointing, index)
        kept += entry if recomputed else block
        again = max(again, 2 * block if recomputed else block)  # a block's gradients are about what it keeps
    return kept, again


def _head(bones: Skeleton, tokens: int) -> int:
    """Logits and their softmax, in fp32, for as many rows as there are at a time; twice the gradient of a head."""
    weight: Any = bones.model.get_submodule(bones.anatomy.head).weight
    assert isinstance(weight, Tensor)
    logits = 2 * 4 * min(AT_ONCE, tokens * weight.shape[0])
    return logits + (2 * 4 * weight.numel() if weight.requires_grad else 0)
