"""AdaLoRA: triplets of P Lambda Q compete for a shrinking budget; PEFT's layer and files, our allocator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn

from dsft.course import Course
from dsft.methods.allocator import Allocator, Schedule, Triplets
from dsft.methods.peft_bridge import ADAPTER, Bridged, inject
from dsft.methods.peft_folder import Folder
from dsft.methods.peft_landing import configured
from dsft.protocols import Anatomy

PARTS = ("lora_A", "lora_B", "lora_E")
"""PEFT's names of Q (r, in), P (out, r) and Lambda (r, 1)."""


@dataclass(frozen=True, kw_only=True)
class AdaLora(Bridged):
    """dW = P Lambda Q alpha / initial_rank. Parameters: initial_rank x (in + out + 1) per target.

    warmup, final: steps before the budget falls and after it has fallen, or shares of the run's steps below 1.
    Every interval steps in between, and at the end of them, the lambdas of all but the best triplets become 0. The
    result holds all triplets, those with lambda 0 too (PEFT 0.21 warns about the rank_pattern of its own files). A run
    that starts from an adapter begins with all its triplets and lets the budget fall anew.
    Source: Zhang et al. 2023, arXiv:2303.10512 (equations 4 to 13); code: QingruZhang/AdaLoRA, PEFT's tuners/adalora.
    """

    rank: int
    initial_rank: int
    alpha: float
    dropout: float
    target_modules: str | tuple[str, ...]
    warmup: int | float
    final: int | float
    interval: int
    beta1: float
    beta2: float
    penalty: float

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _need(self.rank >= 1, "rank", "be 1 or more", self.rank)
        rule = f"be at least method.rank={self.rank}, the rank that is left on average"
        _need(self.initial_rank >= self.rank, "initial_rank", rule, self.initial_rank, "1.5 times it is the paper's")
        _need(self.alpha > 0, "alpha", "be above 0", self.alpha)
        _need(0 <= self.dropout < 1, "dropout", "be in [0, 1)", self.dropout)
        for name in ("warmup", "final"):
            value = getattr(self, name)
            fits = value >= 0 if isinstance(value, int) else 0 <= value < 1
            _need(fits, name, "be a number of steps, or a share of the run's in [0, 1)", value)
        _need(self.interval >= 1, "interval", "be 1 step or more", self.interval)
        for name in ("beta1", "beta2"):
            _need(0 < getattr(self, name) < 1, name, "be in (0, 1)", getattr(self, name))
        _need(self.penalty >= 0, "penalty", "be 0 or more", self.penalty)

    def check(self, total: int) -> None:
        """Refuse a run whose budget could not fall by what two steps have shown."""
        self._schedule(total)

    def _schedule(self, total: int) -> Schedule:
        warmup, final = (int(v * total) if isinstance(v, float) else v for v in (self.warmup, self.final))
        schedule = Schedule(total=total, warmup=warmup, settled=total - final, interval=self.interval)
        if schedule.settled <= max(1, warmup):
            raise ValueError(
                f"train.steps must leave steps between method.warmup ({warmup}) and method.final ({final}), 2 of them "
                f"before the latter, got {total}; raise train.steps or lower method.warmup and method.final"
            )
        return schedule

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Freeze the base and put PEFT's layers around the targets, on meta."""
        model = inject(model, *configured(self.target_modules, model, anatomy, self.config))
        from dsft.methods.svd_linear import adopt

        for name, layer in adopt(model):
            self._check_layer(name, layer, anatomy)
        return model

    def config(self, targets: list[str]) -> Any:
        """PEFT's own configuration object."""
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            target_r=self.rank, init_r=self.initial_rank, lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM", beta1=self.beta1,
            beta2=self.beta2, deltaT=self.interval, orth_reg_weight=self.penalty, total_step=1,
        )  # fmt: skip

    def agree(self) -> Mapping[str, str]:
        """The number of triplets and the scale."""
        return {"init_r": "initial_rank", "lora_alpha": "alpha"}

    def check_stored(self, folder: Folder, model: nn.Module, expected: Mapping[str, Size]) -> None:
        """Without triplets that PEFT has cut out of its file: each target has its own number of them then."""
        if folder.config().get("rank_pattern"):
            raise ValueError(
                "method.init_from must hold every triplet, got an adapter that PEFT has cut to its rank_pattern; merge "
                "it with PEFT's merge_and_unload and train on that model"
            )
        super().check_stored(folder, model, expected)

    def _check_layer(self, name: str, layer: Any, anatomy: Anatomy) -> None:
        if name == anatomy.head:
            raise ValueError(
                f"method.target_modules must name linears in blocks, got {name}; AdaLoRA's parts are no modules, which "
                "ZeRO-3 does not gather outside of a block; take method=lora for it"
            )
        smallest = min(layer.in_features, layer.out_features)
        rule = f"be at most {smallest}, the smaller side of {name}"
        _need(self.initial_rank <= smallest, "initial_rank", rule, self.initial_rank)

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """P, Q ~ N(0, 0.02), Lambda = 0: the base at the start (the paper's code)."""
        value = torch.zeros(param.shape, dtype=torch.float32)
        return value if f".lora_E.{ADAPTER}" in name else value.normal_(std=0.02)

    def course(self, model: nn.Module, total: int, device: torch.device) -> Course:
        """The penalty and the allocation."""
        schedule = self._schedule(total)
        config: Any = model.peft_config[ADAPTER]  # type: ignore[index]
        config.total_step, config.tinit, config.tfinal = total, schedule.warmup, total - schedule.settled
        shapes = {name: param.shape for name, param in model.named_parameters() if param.requires_grad}
        layers = [name.removesuffix(f".lora_A.{ADAPTER}") for name in shapes if ".lora_A." in name]
        triplets = [Triplets(layer, *(f"{layer}.{part}.{ADAPTER}" for part in PARTS)) for layer in layers]
        return Allocator(self.rank, self.penalty, (self.beta1, self.beta2), schedule, (triplets, shapes, device))


def _need(fits: bool, key: str, rule: str, value: object, way_out: str = "") -> None:
    if not fits:
        raise ValueError(f"method.{key} must {rule}, got {value}{f'; {way_out}' if way_out else ''}")
