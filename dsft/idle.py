"""Settings that another setting leaves without effect: refused where they were typed, so that none is ignored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from dsft.config import Launcher, Run, Slurm

OF_A_JOB = tuple(
    f"launcher.{field.name}" for field in fields(Slurm) if field.name not in {own.name for own in fields(Launcher)}
)
"""What only a SLURM job takes."""


@dataclass(frozen=True)
class Idle:
    """idle(run, kind) -> True where none of the keys has an effect. kind: of the start; way: why, and the way out."""

    keys: tuple[str, ...]
    idle: Callable[[Run, str], bool]
    way: str


TABLE = (
    Idle(
        OF_A_JOB,
        lambda run, kind: kind != "slurm",
        "is asked of SLURM, and this run is no SLURM job ({kind}); take launcher=slurm, or leave it out",
    ),
    Idle(
        ("train.early_stop_patience",),
        lambda run, kind: run.train.early_stop_metric is None,
        "counts evaluations of train.early_stop_metric, which is null; set that, or leave it out",
    ),
    Idle(
        ("train.max_nonfinite",),
        lambda run, kind: run.train.on_nonfinite == "stop",
        "counts steps that train.on_nonfinite=skip drops, and it is stop; set that, or leave it out",
    ),
    Idle(
        ("optim.decay_steps",),
        lambda run, kind: run.optim.schedule != "wsd",
        "is the length of the decay of optim.schedule=wsd, and it is {run.optim.schedule}; set that, or leave it out",
    ),
    Idle(
        ("optim.min_lr_ratio",),
        lambda run, kind: run.optim.schedule == "constant",
        "is the floor of a schedule that falls, and optim.schedule is constant; set that, or leave it out",
    ),
    Idle(
        ("optim.betas", "optim.eps"),
        lambda run, kind: run.optim.name in ("sgd", "adafactor"),
        "belongs to AdamW, and optim.name is {run.optim.name}; leave it out",
    ),
    Idle(
        ("quantization.unpack_mib",),
        lambda run, kind: not run.quantization.packs_experts,
        "is of packed experts, and quantization.experts=false packs none; leave it out",
    ),
    Idle(
        ("checkpoint.keep", "checkpoint.keep_every", "checkpoint.background", "checkpoint.keep_best"),
        lambda run, kind: run.checkpoint.every == 0,
        "belongs to checkpoints, and checkpoint.every=0 saves none; set that, or leave it out",
    ),
)


def refuse_idle(run: Run, kind: str, typed: Mapping[str, object]) -> None:
    """Raise ValueError for the first key of typed, key -> value, that has no effect in this run.

    A value that asks for nothing (null, false, 0, an empty text or list) is let through. kind: of the start.
    """
    for key, value in typed.items():
        for each in TABLE:
            mine = any(key == name or key.startswith(f"{name}.") for name in each.keys)
            if mine and value and each.idle(run, kind):
                raise ValueError(f"{key}={value} {each.way.format(run=run, kind=kind)}")


OF_EXPERTS = ("quantization.experts", "quantization.unpack_mib")
"""Keys that have an effect only on a model with fused experts."""


def refuse_without_experts(overrides: Sequence[str], *, there: bool) -> None:
    """Raise ValueError for a word that only a model with fused experts takes, if none are there."""
    for word in () if there else overrides:
        key, _, value = word.lstrip("+").partition("=")
        if key in OF_EXPERTS and value not in ("false", "0", "null"):
            raise ValueError(f"{word} is of fused experts, and this model has none; leave it out")


OF_A_SWEEP = "launcher.max_parallel"
"""What only a sweep takes."""


def refuse_of_a_sweep(overrides: Sequence[str]) -> None:
    """Raise ValueError for a word that only a sweep takes; one that asks for nothing (null) is let through."""
    for word in overrides:
        key, _, value = word.lstrip("+").partition("=")
        if key == OF_A_SWEEP and value not in ("null", ""):
            raise ValueError(f"{word} is of the points of a sweep, and this is one run; add -m, or leave it out")
