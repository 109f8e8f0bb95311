"""The bridge to PEFT: its layers put on meta, its names and its file format; one file beside this one per family."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dsft.imports import uncompiled
from dsft.protocols import Method

ADAPTER = "default"
"""PEFT's name for the one adapter that learns."""


class Bridged(Method):
    """A method whose layers and file are PEFT's: attach calls inject, save writes what PeftModel reads."""

    @abstractmethod
    def config(self, targets: list[str]) -> Any:
        """PEFT's own configuration object, for modules of these names."""

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them."""
        tensors = {peft_name(name): value for name, value in weights.items()}
        return write_adapter(model.peft_config[ADAPTER], tensors, folder, base)  # type: ignore[index]

    def merge(self, model: nn.Module) -> nn.Module:
        """As PEFT merges; model: PEFT's own around the base, or what attach made of it."""
        merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
        return merged


def inject(model: nn.Module, config: Any, *, on_meta: bool = True) -> nn.Module:
    """Freeze model and put PEFT's layers around the modules that config names, on meta or CPU. What is new learns."""
    with uncompiled():
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # seconds: after what can be refused without it

    model.requires_grad_(False)
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](
        model, config, adapter_name=ADAPTER, low_cpu_mem_usage=on_meta
    )
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]  # autocast casts, without an fp32 copy
    injected: nn.Module = tuner.model
    return injected


def write_adapter(config: Any, tensors: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
    """Write both files of an adapter; returns the tensors as they are in the file."""
    from safetensors.torch import save_file

    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    written = {name: value.contiguous() for name, value in tensors.items()}
    save_file(written, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return written


def peft_name(name: str) -> str:
    """A parameter's name in PEFT's file: under base_model.model, without the adapter's name."""
    name = name.replace(f".lora_magnitude_vector.{ADAPTER}.weight", ".lora_magnitude_vector")
    return "base_model.model." + f"{name}.".replace(f".{ADAPTER}.", ".").removesuffix(".")
