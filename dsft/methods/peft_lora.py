"""The LoRA family on PEFT's layers: LoRA, rsLoRA and DoRA by its options, LoRA+ by two learning rates."""

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsft.methods import expert_lora
from dsft.methods.patterns import check_sorted, ends_with
from dsft.methods.peft_bridge import ADAPTER, Bridged, inject
from dsft.methods.peft_landing import configured, taken_for_experts
from dsft.methods.peft_targets import nearest
from dsft.protocols import Anatomy

OPTIONS: dict[str, type] = {"use_dora": bool, "use_rslora": bool, "rank_pattern": dict, "alpha_pattern": dict}
"""Keys of peft.LoraConfig that options may hold."""

AGREE = {"r": "rank", "lora_alpha": "alpha", **{key: f"options.{key}" for key in OPTIONS}}
"""Keys of peft.LoraConfig that decide what an adapter's numbers mean -> ours."""


@dataclass(frozen=True, kw_only=True)
class LoraLayers(Bridged):
    """Linears with a product of two thin matrices beside them: y = W x + s B A x, s = alpha / rank.

    Parameters: rank x (in + out) per target, plus out per target with DoRA. With use_rslora s = alpha / sqrt(rank).
    Source: LoRA, Hu et al. 2021, arXiv:2106.09685; rsLoRA, Kalajdzievski 2023, arXiv:2312.03732; DoRA, Liu et al.
    2024, arXiv:2402.09353; code: PEFT's tuners/lora.
    """

    rank: int
    alpha: float
    dropout: float
    target_modules: str | tuple[str, ...]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse values outside their range, and options whose start is not known here."""
        if self.rank < 1:
            raise ValueError(f"method.rank must be 1 or more, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"method.alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"method.dropout must be in [0, 1), got {self.dropout}")
        self._check_options()

    def _check_options(self) -> None:
        """Refuse keys and values that are not PEFT's, or not known here."""
        for key, value in self.options.items():
            if key not in OPTIONS:
                raise ValueError(f"method.options may hold {', '.join(OPTIONS)}, got {key}{nearest(key, OPTIONS)}")
            if not isinstance(value, OPTIONS[key]):
                kind = "true or false" if OPTIONS[key] is bool else "{name: number}"
                raise ValueError(f"method.options.{key} must be {kind}, got {value}")
        for name, rank in self.pattern("rank_pattern").items():
            if not (type(rank) is int and rank >= 1):
                raise ValueError(f"method.options.rank_pattern.{name} must be a whole number of 1 or more, got {rank}")
        for name, alpha in self.pattern("alpha_pattern").items():
            if isinstance(alpha, bool) or not (isinstance(alpha, int | float) and alpha > 0):
                raise ValueError(f"method.options.alpha_pattern.{name} must be a number above 0, got {alpha}")

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Freeze the base and put PEFT's layers around the targets, on meta."""
        words = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        self._check_words(words)
        return self.put_in(model, anatomy, words)

    def put_in(
        self, model: nn.Module, anatomy: Anatomy, words: tuple[str, ...], beside: Sequence[str] = ()
    ) -> nn.Module:
        """Freeze the base and put PEFT's layers around the linears that words mean, on meta.

        beside: names of what else is adapted, which a pattern may mean.
        """
        config, chosen = configured(words, model, anatomy, self.config)
        self._check_taken(taken_for_experts(config, model), model)
        self._check_patterns({*chosen, *beside})
        for name in sorted(chosen):
            self._check_rank(name, model.get_submodule(name))
        model = inject(model, config, chosen)
        self.fused(model)
        return model

    def config(self, targets: list[str]) -> Any:
        """PEFT's own configuration object."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # PEFT says int and divides by r
            lora_dropout=self.dropout,
            target_modules=targets,
            bias="none",
            task_type="CAUSAL_LM",
            **self.options,
        )

    def pattern(self, option: str) -> dict[str, Any]:
        """Name or regular expression -> rank or alpha of its targets; empty where none is given."""
        found: dict[str, Any] = self.options[option] if option in self.options else {}
        return found

    def agree(self) -> Mapping[str, str]:
        """Ranks, scales and what is computed of them."""
        return AGREE

    @abstractmethod
    def fused(self, model: nn.Module) -> None:
        """Give PEFT's layers in model the forward that they get here."""

    @property
    def plain(self) -> bool:
        """True if the result is the product of two matrices for each target, of one rank and scale."""
        return self.options.items().isdisjoint({("use_dora", True)}) and not (
            self.pattern("rank_pattern") or self.pattern("alpha_pattern")
        )

    def _check_words(self, words: tuple[str, ...]) -> None:
        """Refuse fused experts, unless the method says otherwise."""
        if expert_lora.WORD in words:
            raise ValueError(
                f"method.target_modules must not name {expert_lora.WORD} with this method, which adapts linears; take "
                "method=lora"
            )

    def _check_taken(self, taken: set[str], model: nn.Module) -> None:
        """Refuse what no loader of PEFT's would read of linears that have the names of experts (see peft_landing)."""
        if taken and not self.plain:
            kind: Any = model.config
            raise ValueError(
                f"method.target_modules must not name {min(taken)} with this method or its options: in a "
                f"{kind.model_type} model PEFT takes that name for the experts and loads no more than plain LoRA for "
                "the linears that have it; take method.target_modules=attention, or method=lora without options"
            )

    def _check_patterns(self, chosen: set[str]) -> None:
        """Each key of a pattern must be some target's name, by PEFT's own rule: a regular expression for its end."""
        for option in ("rank_pattern", "alpha_pattern"):
            for key in self.pattern(option):
                if not any(ends_with(key, name) for name in chosen):
                    leaves = sorted({name.rpartition(".")[2] for name in chosen})
                    raise ValueError(
                        f"method.options.{option}: {key} matches no target{nearest(key, leaves)}; the targets are "
                        f"{', '.join(leaves)}"
                    )
            check_sorted(f"method.options.{option}", self.pattern(option), chosen)

    def _check_rank(self, name: str, linear: Any) -> None:
        """A product of more than the smaller side is no thin one."""
        patterns = self.pattern("rank_pattern")
        key = next((key for key in patterns if ends_with(key, name)), None)
        rank, word = (self.rank, "rank") if key is None else (patterns[key], f"options.rank_pattern.{key}")
        most = min(linear.in_features, linear.out_features)
        if rank > most:
            raise ValueError(
                f"method.{word} must be at most {most}, the smaller side of {name} ({linear.out_features} x "
                f"{linear.in_features}), got {rank}; take a smaller one, or other method.target_modules"
            )


@dataclass(frozen=True, kw_only=True)
class LinearLora(LoraLayers):
    """LoRA of linears. B starts at zero, or both factors where an earlier run, or PEFT itself, left them."""

    def fused(self, model: nn.Module) -> None:
        """The sum in place, but for DoRA."""
        from dsft.methods.fused_lora import fuse

        fuse(model, ADAPTER)

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """PEFT's defaults: A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming, a = sqrt 5), B = 0, magnitude = row norms of W."""
        layer, kind, _ = re.split(r"\.(lora_A|lora_B|lora_magnitude_vector)\.", name, maxsplit=1)
        value = torch.zeros(param.shape, dtype=torch.float32)
        if kind == "lora_A":
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))
        elif kind == "lora_magnitude_vector":
            value = torch.linalg.norm(read(f"{layer}.base_layer").float(), dim=1)
        return value


@dataclass(frozen=True, kw_only=True)
class Lora(LinearLora):
    """LoRA of linears and fused experts.

    expert_rank: of the adapters of fused experts, which target_modules may name; None is rank. Their parameters are
    E expert_rank (in + out) for each stack (E, out, in).
    """

    expert_rank: int | None = None

    def __post_init__(self) -> None:
        """Refuse a rank of experts that is none."""
        super().__post_init__()
        if self.expert_rank is not None and self.expert_rank < 1:
            raise ValueError(f"method.expert_rank must be 1 or more, or null for rank, got {self.expert_rank}")

    def put_in(
        self, model: nn.Module, anatomy: Anatomy, words: tuple[str, ...], beside: Sequence[str] = ()
    ) -> nn.Module:
        """Freeze the base and put layers around linears, and beside the stacks of fused experts where words say so."""
        stacks = expert_lora.stacks(model, anatomy) if expert_lora.WORD in words else []
        linears = tuple(word for word in words if word != expert_lora.WORD)
        if linears or not stacks:
            model = super().put_in(model, anatomy, linears, stacks)
        else:
            self._check_patterns(set(stacks))
            model.requires_grad_(False)
            model.peft_config = {ADAPTER: self.config([])}  # type: ignore[assignment]  # as PEFT's own layers leave it
        ranks = {stack: self._rank_of(stack, min(expert_lora.sides(model, stack)[1:])) for stack in stacks}
        if stacks and self.expert_rank is not None and self.expert_rank not in ranks.values():
            raise ValueError(
                f"method.expert_rank={self.expert_rank} has no effect, as method.options.rank_pattern names every "
                "stack of experts; leave one of them out"
            )
        for stack, rank in ranks.items():
            expert_lora.add(model, stack, rank, self._scale(stack, rank))
        config = expert_lora.portable(model.peft_config[ADAPTER], model)  # type: ignore[index]
        check_sorted("method.expert_rank and method.options.rank_pattern", config.rank_pattern, stacks)
        return model

    def _rank_of(self, stack: str, most: int) -> int:
        """Rank of the adapter of a stack whose smaller side is most."""
        rank = self._of_pattern("rank_pattern", stack) or self.expert_rank or self.rank
        if rank > most:
            raise ValueError(
                f"method.expert_rank must be at most {most}, the smaller side of an expert of {stack}, got {rank}; "
                "take a smaller one"
            )
        return int(rank)

    def _scale(self, stack: str, rank: int) -> float:
        alpha = self._of_pattern("alpha_pattern", stack) or self.alpha
        rooted = self.options.items() >= {("use_rslora", True)}
        return alpha / (math.sqrt(rank) if rooted else rank)

    def _of_pattern(self, option: str, name: str) -> Any:
        """Return what an option's pattern says of name, by PEFT's own rule; None if nothing."""
        return next((value for key, value in self.pattern(option).items() if ends_with(key, name)), None)

    def _check_words(self, words: tuple[str, ...]) -> None:
        """Refuse what PEFT cannot store of experts."""
        if expert_lora.WORD not in words:
            if self.expert_rank is not None:
                raise ValueError(
                    f"method.expert_rank must be null where method.target_modules does not name {expert_lora.WORD}, "
                    f"got {self.expert_rank}; add {expert_lora.WORD} to it, or leave expert_rank out"
                )
            return
        if self.dropout:
            raise ValueError(
                f"method.dropout must be 0 where method.target_modules names {expert_lora.WORD}, got {self.dropout}: "
                "PEFT has none beside fused experts; set method.dropout=0"
            )
        if self.options.items() >= {("use_dora", True)}:
            raise ValueError(
                f"method.options.use_dora must be left out where method.target_modules names {expert_lora.WORD}, got "
                "true: PEFT has none beside fused experts; take method=lora"
            )

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Give each expert by itself the first values that a linear has."""
        found = expert_lora.initial(name, param)
        return super().initial(model, name, param, read) if found is None else found


@dataclass(frozen=True, kw_only=True)
class LoraPlus(Lora):
    """LoRA whose B learns faster than A: rate of B = lr_ratio x optim.lr, of A optim.lr.

    Source: LoRA+, Hayou, Ghosh, Yu 2024, arXiv:2402.12354, section 5 (ratio 2^4).
    """

    lr_ratio: float

    def __post_init__(self) -> None:
        """Refuse a ratio that is none."""
        super().__post_init__()
        if not self.lr_ratio > 0:
            raise ValueError(f"method.lr_ratio must be above 0, got {self.lr_ratio}")

    def rate(self, name: str, lr: float) -> float:
        """lr_ratio times lr for B."""
        return self.lr_ratio * lr if f".lora_B.{ADAPTER}." in name or expert_lora.is_second(name) else lr
