"""The bridge to PEFT: its layers, names and file format, attached on meta and filled from a seed (LoRA family)."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsft.imports import uncompiled
from dsft.protocols import ROLES, Anatomy, Method

ADAPTER = "default"
"""PEFT's name for the one adapter that learns."""


@dataclass(frozen=True, kw_only=True)
class Peft(Method):
    """A PEFT method. Parameters: rank x (in + out) per target, plus out per target with DoRA.

    Source: LoRA, Hu et al. 2021, arXiv:2106.09685; DoRA, Liu et al. 2024, arXiv:2402.09353; code: PEFT's tuners/lora.
    """

    type: str
    rank: int
    alpha: float
    dropout: float
    target_modules: str | tuple[str, ...]
    options: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse values outside their range, and options whose start this bridge cannot give."""
        if self.rank < 1:
            raise ValueError(f"method.rank must be 1 or more, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"method.alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"method.dropout must be in [0, 1), got {self.dropout}")
        if self.type != "LORA":
            raise ValueError(f"method.type must be LORA, got {self.type}; other PEFT types are not bridged yet")
        unknown = sorted(set(self.options) - {"use_dora", "use_rslora"})
        if unknown:
            raise ValueError(f"method.options may hold use_dora and use_rslora, got {unknown[0]}")

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Freeze the base and put PEFT's layers around the targets, on meta."""
        targets = resolve_targets(self.target_modules, model, anatomy)
        with uncompiled():
            from peft import inject_adapter_in_model  # seconds: after what can be refused without it

        from dsft.methods.fused_lora import fuse

        model.requires_grad_(False)
        model = inject_adapter_in_model(self.config(targets), model, adapter_name=ADAPTER)
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.cast_input_dtype_enabled = False  # type: ignore[assignment]  # autocast casts, without an fp32 copy
        fuse(model, ADAPTER)
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

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """PEFT's defaults: A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming, a = sqrt 5), B = 0, magnitude = row norms of W."""
        layer, kind, _ = re.split(r"\.(lora_A|lora_B|lora_magnitude_vector)\.", name, maxsplit=1)
        value = torch.zeros(param.shape, dtype=torch.float32)
        if kind == "lora_A":
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))
        elif kind == "lora_magnitude_vector":
            value = torch.linalg.norm(read(f"{layer}.base_layer").float(), dim=1)
        return value

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them."""
        from safetensors.torch import save_file

        config: Any = model.peft_config[ADAPTER]  # type: ignore[index]
        config.base_model_name_or_path = base
        config.inference_mode = True
        config.save_pretrained(str(folder))
        tensors = {_peft_name(name): value.contiguous() for name, value in weights.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return tensors


def _peft_name(name: str) -> str:
    """A parameter's name in PEFT's file: under base_model.model, without the adapter's name."""
    name = name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return "base_model.model." + name.replace(f".{ADAPTER}.", ".")


def resolve_targets(wanted: str | tuple[str, ...], model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Module names for PEFT: short suffixes where they mean the same modules, else full names.

    wanted: all-linear, roles, names, or one regular expression. Raises ValueError for a word that matches nothing and
    for an adapter on a tied head.
    """
    words = (wanted,) if isinstance(wanted, str) else wanted
    modules = {*anatomy.linears, anatomy.head}
    chosen: set[str] = set()
    for word in words:
        found = _matching(word, modules, anatomy)
        if not found:
            leaves = sorted({name.rpartition(".")[2] for name in modules})
            raise ValueError(
                f"method.target_modules: {word} matches no linear; there are: all-linear, {', '.join(ROLES)}, "
                f"{', '.join(leaves)}"
            )
        chosen |= found
    if anatomy.tied and anatomy.head in chosen:
        raise ValueError(
            f"method.target_modules must not name {anatomy.head}: it shares its weight with the embedding, which the "
            "adapter would split; leave it out, or take method=freeze with method.trainable=[head]"
        )
    suffixes = {name.rpartition(".")[2] for name in chosen}
    every = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes) if every == chosen else sorted(chosen)


def _matching(word: str, modules: set[str], anatomy: Anatomy) -> set[str]:
    if word == "all-linear":
        return set(anatomy.linears)
    if word in ROLES:
        return {name for name, role in anatomy.linears.items() if role == word}
    exact = {name for name in modules if name == word or name.endswith(f".{word}")}
    if exact:
        return exact
    try:
        return {name for name in modules if re.fullmatch(word, name)}
    except re.error as error:
        raise ValueError(f"method.target_modules: {word} is no regular expression ({error})") from error
