"""Which combinations are refused, as data. Names of options, not classes; no torch."""

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsft.config import Run, Slurm


@dataclass(frozen=True)
class Place:
    """Where a run will be. size: processes in all; gpus: of each node; here: whether this machine is the node."""

    size: int
    gpus: int
    here: bool


@dataclass(frozen=True)
class Rule:
    """holds(run, names, at) -> True where the combination is refused; why: one line with the way out."""

    name: str
    holds: Callable[[Run, Mapping[str, str], Place], bool]
    why: str


class RuleError(ValueError):
    """The refusal of a rule. Its arguments are the name of the rule and why it refuses."""

    @property
    def rule(self) -> str:
        """The name of the rule."""
        return str(self.args[0])

    def __str__(self) -> str:
        return str(self.args[1])


SHARDED = ("fsdp", "hsdp", "zero1", "zero2", "zero3")
SHARD_WISE = ("adamw", "sgd")
"""Optimizers that update each element from itself alone: right on any shard of a tensor."""

MOVE_IN_BACKWARD = ("single", "fsdp", "hsdp")
"""Strategies whose gradients are whole, over all ranks, when the hook of a parameter is called."""

PER_CORE = 8
"""Processes that a core may carry where there is no accelerator."""

REFUSED = (
    Rule(
        "too-many-devices",
        lambda run, names, at: _over_capacity(run, at) is not None,
        "{capacity}",
    ),
    Rule(
        "single-process",
        lambda run, names, at: names["strategy"] == "single" and at.size > 1,
        "strategy=single runs on one process, got {size}; take strategy=fsdp or ddp, or launcher.devices=1",
    ),
    Rule(
        "batch-below-ranks",
        lambda run, names, at: run.train.global_batch_size < at.size,
        "train.global_batch_size must be at least the number of data ranks, {size}, got "
        "{run.train.global_batch_size}; raise it or lower launcher.devices",
    ),
    Rule(
        "unmeasured",
        lambda run, names, at: run.train.early_stop_metric not in (None, *measured(run)),
        "train.early_stop_metric must be one of {measured}, which objective={names[objective]} measures, got "
        "{run.train.early_stop_metric}",
    ),
    Rule(
        "unmeasured-best",
        lambda run, names, at: run.checkpoint.keep_best not in (None, *measured(run)),
        "checkpoint.keep_best must be one of {measured}, which objective={names[objective]} measures, got "
        "{run.checkpoint.keep_best}",
    ),
    Rule(
        "best-without-evaluations",
        lambda run, names, at: run.checkpoint.keep_best is not None and run.train.eval_every == 0,
        "checkpoint.keep_best needs evaluations to look at, got train.eval_every=0; set it",
    ),
    Rule(
        "warm-up-without-end",
        lambda run, names, at: run.train.steps is not None and run.optim.warmup_steps >= run.train.steps,
        "optim.warmup_steps must be below train.steps, {run.train.steps}, got {run.optim.warmup_steps}: the rate would "
        "never be reached",
    ),
    Rule(
        "optimizer-on-shards",
        lambda run, names, at: names["strategy"] in SHARDED and run.optim.name not in SHARD_WISE,
        "optim.name={run.optim.name} needs whole tensors (its blocks or factors cross shards) and "
        "strategy={names[strategy]} splits them; take optim.name=adamw or strategy=ddp",
    ),
    Rule(
        "in-backward-unclipped",
        lambda run, names, at: run.optim.in_backward and math.isfinite(run.train.max_grad_norm),
        "optim.in_backward=true moves parameters before the global gradient norm is known, and train.max_grad_norm="
        "{run.train.max_grad_norm} clips by it; take train.max_grad_norm=inf or optim.in_backward=false",
    ),
    Rule(
        "in-backward-stops",
        lambda run, names, at: run.optim.in_backward and run.train.on_nonfinite == "skip",
        "optim.in_backward=true moves parameters before a NaN or Inf is seen, so train.on_nonfinite=skip could skip "
        "nothing; take train.on_nonfinite=stop or optim.in_backward=false",
    ),
    Rule(
        "in-backward-strategy",
        lambda run, names, at: run.optim.in_backward and names["strategy"] not in MOVE_IN_BACKWARD,
        "optim.in_backward=true needs a gradient that is whole when backward has made it, and strategy="
        "{names[strategy]} adds the ranks' up afterwards; take strategy=fsdp or optim.in_backward=false",
    ),
    Rule(
        "whole-gradients-in-backward",
        lambda run, names, at: run.optim.in_backward and run.method.guides,
        "optim.in_backward=true frees each gradient when it has moved its parameter, and method={names[method]} looks "
        "at all of them before the step; take optim.in_backward=false",
    ),
    Rule(
        "whole-gradients-offloaded",
        lambda run, names, at: run.method.guides and names["strategy"] in SHARDED and _of(run, "offload") != "none",
        "strategy.offload={run.strategy.offload} takes gradients out of the ranks' reach, and method={names[method]} "
        "gathers them at each step; take strategy.offload=none",
    ),
    Rule(
        "no-compiler",
        lambda run, names, at: run.train.compile is True and missing_compiler(at.gpus) is not None,
        "train.compile=true needs {compiler}, which this machine has not; install it, or take train.compile=false",
    ),
    Rule(
        "compiled-profile",
        lambda run, names, at: run.train.compile is True and run.train.profile > 0,
        "train.profile={run.train.profile} tells the parts of a block apart, and train.compile=true makes one program "
        "of them; take train.compile=false to profile",
    ),
    Rule(
        "whole-model-on-packed-base",
        lambda run, names, at: run.method.whole and names["quantization"] != "none",
        "method={names[method]} trains the base's own weights and quantization={names[quantization]} freezes them as "
        "bytes; take quantization=none or method=qlora",
    ),
    Rule(
        "rounded-on-packed-base",
        lambda run, names, at: names["method"] == "qat_lora" and names["quantization"] != "none",
        "method=qat_lora rounds base + delta to the grid of method.scheme={run.method.scheme}, and quantization="
        "{names[quantization]} has rounded the base to another; take quantization=none or method=lora",
    ),
    Rule(
        "sparse-difference-on-packed-base",
        lambda run, names, at: names["method"] == "diff_pruning" and names["quantization"] != "none",
        "method=diff_pruning changes single weights of the base and quantization={names[quantization]} packs them as "
        "bytes with scales that many share; take quantization=none or method=qlora",
    ),
    Rule(
        "stop-before-pruning",
        lambda run, names, at: names["method"] == "diff_pruning" and run.train.early_stop_metric is not None,
        "train.early_stop_metric={run.train.early_stop_metric} may end a run before method=diff_pruning has chosen "
        "what it keeps; take train.early_stop_metric=null and fewer train.steps",
    ),
    Rule(
        "best-before-pruning",
        lambda run, names, at: names["method"] == "diff_pruning" and run.checkpoint.keep_best is not None,
        "checkpoint.keep_best={run.checkpoint.keep_best} may choose a step before method=diff_pruning has chosen what "
        "it keeps; take checkpoint.keep_best=null",
    ),
    Rule(
        "noise-beside-a-reference",
        lambda run, names, at: run.method.noisy and run.objective.compares,
        "objective={names[objective]} compares forward passes, which must be alike, and method={names[method]} draws "
        "random gates in training; take another method",
    ),
    Rule(
        "qlora-without-4-bit",
        lambda run, names, at: names["method"] == "qlora" and names["quantization"] != "nf4",
        "method=qlora means a 4-bit base, got quantization={names[quantization]}; take method=lora for it",
    ),
    Rule(
        "int8-lora-without-8-bit",
        lambda run, names, at: names["method"] == "int8_lora" and names["quantization"] != "int8",
        "method=int8_lora means an 8-bit base, got quantization={names[quantization]}; take method=lora for it",
    ),
    Rule(
        "hsdp-shape",
        lambda run, names, at: (
            names["strategy"] == "hsdp"
            and isinstance(_of(run, "shard_size"), int)
            and at.size % _of(run, "shard_size") != 0
        ),
        "strategy.shard_size must divide the number of ranks, {size}, got {run.strategy.shard_size}",
    ),
    Rule(
        "hsdp-on-fewer-nodes",
        lambda run, names, at: (
            names["strategy"] == "hsdp"
            and isinstance(run.launcher, Slurm)
            and run.launcher.elastic
            and isinstance(_of(run, "shard_size"), int)
            and at.size // run.launcher.nodes % _of(run, "shard_size") != 0
        ),
        "strategy.shard_size must divide the ranks of one node where launcher.elastic=true, so that a lost node leaves "
        "whole shards, got {run.strategy.shard_size}; take strategy.shard_size=node or launcher.elastic=false",
    ),
)


def refuse(run: Run, names: Mapping[str, str], at: Place) -> None:
    """Raise RefusedError for the first rule that refuses this run there."""
    for rule in REFUSED:
        if rule.holds(run, names, at):
            found = {"capacity": _over_capacity(run, at), "compiler": missing_compiler(at.gpus)}
            why = rule.why.format(run=run, names=names, size=at.size, measured=" ".join(measured(run)), **found)
            raise RuleError(rule.name, why)


def _of(run: Run, key: str) -> Any:
    """A key that some strategies have."""
    return getattr(run.strategy, key)


def measured(run: Run) -> tuple[str, ...]:
    """Names of what an evaluation of this run may measure."""
    terms = run.objective.terms if len(run.objective.terms) > 1 else ()
    names = ("loss", *(f"loss/{term}" for term in terms), *run.objective.measures)
    generated = ("accuracy",) if run.objective.wants == "text" else ()
    return tuple(f"eval/{name}" for name in (*names, *generated))


def missing_compiler(gpus: int) -> str | None:
    """What torch.compile wants to make programs with and this machine has not; None where nothing is missing."""
    if gpus:
        return None if importlib.util.find_spec("triton") else "triton (pip install triton)"
    return None if shutil.which(os.environ.get("CXX", "g++")) else "a C++ compiler (g++, or another that CXX names)"


def _over_capacity(run: Run, at: Place) -> str | None:
    devices = run.launcher.devices
    if devices == "auto" or not at.here:
        return None
    found = at.gpus
    if found and devices > found:
        return f"launcher.devices must be at most {found}, the accelerators of this machine, got {devices}"
    cores = os.cpu_count() or 1
    if not found and devices > PER_CORE * cores:
        return (
            f"launcher.devices must be at most {PER_CORE * cores}, {PER_CORE} for each of {cores} cores, got {devices}"
        )
    return None
