"""The schema of a run: frozen dataclasses without defaults; the YAML tree under conf/ holds the values.

Groups whose option is a class (model, method, quantization, strategy, objective, data, tracker) name it with
`_target_`; that dataclass is its own schema. The plain groups are here. Imports neither torch nor Hydra.
"""

import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from dsft_launchers.cluster import minutes
from dsft_launchers.gpus import asks_for_gpus
from dsft_launchers.join import ON_CPUS
from dsft_launchers.submit import refuse_controls

if TYPE_CHECKING:
    from dsft.data.source import Source
    from dsft.models.files import ModelFiles
    from dsft.objective import Objective
    from dsft.protocols import BaseModel, Method, Quantizer, Tracker
    from dsft.strategy import Strategy
else:  # nothing is imported from above: who builds a run checks these parts
    BaseModel = Method = Quantizer = Tracker = Objective = Source = Strategy = Any


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, how much at once, how exact."""

    steps: int | None
    epochs: float | None
    max_minutes: float | None
    global_batch_size: int
    micro_batch_tokens: int
    max_length: int
    seed: int
    precision: Literal["bf16", "fp32"]
    max_grad_norm: float
    gradient_checkpointing: Literal["none", "full", "selective"]
    offload_activations: bool
    compile: bool | Literal["auto"]
    eval_every: int
    early_stop_metric: str | None
    early_stop_patience: int
    on_nonfinite: Literal["stop", "skip"]
    max_nonfinite: int
    log_samples: bool
    profile: int
    hang_after: float
    deterministic: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError("train: give train.steps or train.epochs, not both; set one of them to null")
        _at_least("train.steps", self.steps, 1)
        for name in ("epochs", "max_minutes", "hang_after"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"train.{name} must be above 0, got {value}")
        for name in ("global_batch_size", "micro_batch_tokens", "early_stop_patience"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        _at_least("train.max_length", self.max_length, 2)
        if self.early_stop_metric is not None and self.eval_every == 0:
            raise ValueError("train.early_stop_metric needs evaluations to look at, got train.eval_every=0; set it")
        for name in ("seed", "eval_every", "max_nonfinite", "profile"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        if self.profile and self.steps is not None and self.profile >= self.steps:
            raise ValueError(
                f"train.profile must be below train.steps, {self.steps}, got {self.profile}: the first step warms up; "
                "lower it, or raise train.steps"
            )
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"train.max_grad_norm must be above 0, got {self.max_grad_norm}; inf switches clipping off"
            )


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "paged_adamw8bit", "adafactor", "sgd"]
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    momentum: float
    schedule: Literal["constant", "linear", "cosine", "wsd"]
    warmup_steps: int
    decay_steps: int
    min_lr_ratio: float
    in_backward: bool

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not self.lr > 0:
            raise ValueError(f"optim.lr must be above 0, got {self.lr}")
        _at_least("optim.warmup_steps", self.warmup_steps, 0)
        _at_least("optim.decay_steps", self.decay_steps, 0)
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay must be 0 or more, got {self.weight_decay}")
        for name, value in (("betas[0]", self.betas[0]), ("betas[1]", self.betas[1]), ("momentum", self.momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"optim.{name} must be in [0, 1), got {value}")
        if not self.eps > 0:
            raise ValueError(f"optim.eps must be above 0, got {self.eps}")
        if self.momentum and self.name != "sgd":
            raise ValueError(f"optim.momentum is sgd's, got it with optim.name={self.name}; leave it at 0")
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise ValueError("optim.schedule=wsd needs the length of its decay, got optim.decay_steps=0; set it")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Where the processes come from; devices = processes per node. max_parallel: points of a sweep at a time.

    gpus: auto, none, any, or a kind as SLURM names it; one GPU for each process.
    """

    name: Literal["auto", "local", "slurm"]
    devices: int | Literal["auto"]
    nodes: int
    max_parallel: int | None
    gpus: str | int = "auto"

    def __post_init__(self) -> None:
        """Refuse counts that start no process."""
        if self.devices != "auto":
            _at_least("launcher.devices", self.devices, 1)
        _at_least("launcher.nodes", self.nodes, 1)
        _at_least("launcher.max_parallel", self.max_parallel, 1)
        if not KIND.fullmatch(str(self.gpus)):
            raise ValueError(
                f"launcher.gpus must be auto, none, any, or a kind of GPU as SLURM names it (h100), got {self.gpus!a}; "
                "launcher.devices is how many a node"
            )


KIND = re.compile(r"(?!\d{1,2}$)[A-Za-z0-9_.-]+")
"""A kind of GPU; a number of one or two digits is how many somebody meant."""
OURS = {"array", "output", "error", "open-mode", "signal", "requeue", "no-requeue"}
"""Options of sbatch that a job's supervisor, or its sweep, relies on."""


@dataclass(frozen=True, kw_only=True)
class Slurm(Launcher):
    """The processes of a SLURM job; None: as the cluster has it. notice_s: from SLURM's signal to the time limit.

    elastic: the job outlives a node that it loses; bind_gpus: each process sees its own GPU alone.
    """

    partition: str | int | None
    account: str | int | None
    qos: str | int | None
    time: str | int | None
    memory: str | int | None
    cpus: int | None
    constraint: str | None
    exclude: str | None
    reservation: str | int | None
    extra: dict[str, str | int | bool]
    setup: list[str]
    prefix: str
    notice_s: int
    elastic: bool
    wait: bool
    dry_run: bool
    bind_gpus: bool = False

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        super().__post_init__()
        refuse_controls({f"launcher.{field.name}": getattr(self, field.name) for field in fields(self)})
        _at_least("launcher.cpus", self.cpus, 1)
        _at_least("launcher.notice_s", self.notice_s, 1)
        if self.time is not None:
            try:
                minutes(str(self.time))
            except ValueError as error:
                raise ValueError(f"launcher.time must be SLURM's: {error}; a number alone is of minutes") from error
        if self.elastic and self.nodes < 2:
            raise ValueError(
                f"launcher.elastic=true goes on with the nodes that are left, got launcher.nodes={self.nodes}; raise "
                "it or leave launcher.elastic at false: SLURM then queues the job again"
            )
        if ours := sorted(OURS & set(self.extra)):
            raise ValueError(
                f"launcher.extra must be without {ours[0]}, which dsft sets itself, got {self.extra[ours[0]]}; -m "
                "makes arrays, the logs lie in RUN/slurm, launcher.notice_s sets the signal"
            )
        own = [f"launcher.extra.{option}" for option in self.extra if asks_for_gpus(option, self.extra[option])]
        if own and (self.bind_gpus or self.gpus != "auto"):
            key = f"launcher.gpus={self.gpus}" if self.gpus != "auto" else "launcher.bind_gpus=true"
            raise ValueError(f"{own[0]} asks for GPUs in sbatch's words, and so does {key}; leave one of them out")
        if self.bind_gpus and self.gpus == ON_CPUS:
            raise ValueError("launcher.bind_gpus=true gives each process a GPU, and launcher.gpus=none takes none")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When state is saved and what stays; every 0: never. keep_best: the metric whose best step stays too, and is what
    the result is of.
    """

    every: int
    keep: int
    keep_every: int
    background: bool
    verify_result: bool
    keep_best: str | None = None

    def __post_init__(self) -> None:
        """Refuse counts that would keep nothing."""
        _at_least("checkpoint.every", self.every, 0)
        _at_least("checkpoint.keep", self.keep, 1)
        _at_least("checkpoint.keep_every", self.keep_every, 0)


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Permissions of a start of a run that is there already. anew and takeover act once and are never stored.

    allow: keys that may differ although they change the numbers; anew: begin at step 1, records and checkpoints move to
    RUN/before-N/; takeover: go on although another process works on the run.
    """

    allow: tuple[str, ...]
    anew: bool
    takeover: bool


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, resolved: everything that decides its numbers, and where it writes.

    The class-valued groups are what their contracts say, which live above this file; compose.py checks each against its
    own dataclass.
    """

    model: "BaseModel"
    method: "Method"
    quantization: "Quantizer"
    strategy: "Strategy"
    objective: "Objective"
    data: "Source"
    optim: Optim
    train: Train
    checkpoint: Checkpoint
    resume: Resume
    launcher: Launcher
    tracker: dict[str, "Tracker"]
    run_dir: str

    def __post_init__(self) -> None:
        """Refuse an objective of labels without their names."""
        if self.objective.head is None and getattr(self.data, "labels", ()) is None:
            raise ValueError(
                "data.labels must list the labels for this objective, whose head has an output for each, got null; set "
                "data.labels=[a,b] to those of your rows"
            )
        self.objective.check(self.labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs of the model's sequence head. The tuple is empty for a language model."""
        names = self.objective.head
        return tuple(getattr(self.data, "labels", None) or ()) if names is None else tuple(names)

    def files(self, *, planning: bool = False) -> "ModelFiles":
        """The base model with this run's labels; see its resolve (dsft/models/source.py)."""
        return replace(self.model.resolve(planning=planning), labels=self.labels)


def _at_least(name: str, value: int | None, floor: int) -> None:
    if value is not None and value < floor:
        raise ValueError(f"{name} must be {floor} or more, got {value}")
