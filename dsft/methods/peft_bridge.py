"""The bridge to PEFT: its layers put on meta, its names and its file format; one file beside this one per family."""

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Size, Tensor, nn

from dsft.imports import uncompiled
from dsft.methods import expert_lora
from dsft.methods.peft_folder import Folder
from dsft.methods.peft_landing import check_landed, names_as_they_are, portable, refused
from dsft.methods.peft_names import as_in_file, file_names, unread
from dsft.methods.stored import TENSORS, Stored, as_it_is, shapes
from dsft.packed import packed_weights
from dsft.protocols import Anatomy, Method

ADAPTER = "default"
"""PEFT's name for the one adapter that learns."""


def load(base: nn.Module, folder: Path) -> Any:
    """PEFT's model of the adapter in folder around base.

    Raises ValueError where the adapter is no safetensors file: PEFT would take a pickle in its place.
    """
    if not (folder / TENSORS).is_file():
        raise ValueError(f"{folder} must hold {TENSORS}, got none; let PEFT save it again with safe_serialization")
    with uncompiled():
        from peft import PeftModel
    with _patterns_of_parameters():
        return PeftModel.from_pretrained(base, folder)


def names_packed(base: nn.Module, described: Mapping[str, Any]) -> bool:
    """True if PEFT's configuration names a weight that base keeps as bytes: PEFT would look for a parameter of that
    name, find none, and leave that part of the adapter out.
    """
    asked = described.get("target_parameters") or ()
    packed = {f"{path}.{key}" for path, module in base.named_modules() for key in packed_weights(module)}
    return any(f".{name}".endswith(f".{end}") for end in asked for name in packed)


def attached(base: nn.Module, anatomy: Anatomy, folder: Path, method: Method) -> nn.Module:
    """Base with the method in it, whose values are those of the adapter in folder: as a run has it, packed or not."""
    begun = method.started_from(str(folder))
    device = next(base.parameters()).device
    model = begun.attach(base, anatomy)
    stored = begun.stored(model)
    for name, param in list(model.named_parameters()):
        if param.requires_grad:
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(stored[name].to(device), requires_grad=False)
            model.get_submodule(owner).register_parameter(leaf, value)
    return model


@contextmanager
def _patterns_of_parameters() -> Iterator[None]:
    """Inside, PEFT does not warn of patterns that mean parameters: it compares them with names of modules alone there,
    and follows them all the same.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield


@dataclass(frozen=True, kw_only=True)
class Bridged(Method):
    """A method whose layers and file are PEFT's: attach calls inject, save writes what PeftModel reads.

    init_from: the folder of a run, of its result or of PEFT's, whose adapter this run starts from.
    """

    init_from: str | None

    @abstractmethod
    def config(self, targets: list[str]) -> Any:
        """PEFT's own configuration object, for modules of these names."""

    def notes(self, model: nn.Module, anatomy: Anatomy) -> Iterable[str]:
        """Linears that PEFT adapts under no name."""
        config: Any = model.peft_config[ADAPTER]  # type: ignore[index]
        reasons = {"PEFT refuses them": refused, "PEFT would not read their adapters back": unread}
        for why, found in reasons.items():
            if out := found(config, model, anatomy.linears):
                kind = model.config.model_type  # type: ignore[union-attr]
                yield f"all-linear leaves out {min(out)} and {len(out) - 1} more: {why} in a {kind} model"

    def agree(self) -> Mapping[str, str]:
        """Keys of PEFT's configuration that decide what an adapter's numbers mean -> ours, under method."""
        return {}

    def stored(self, model: nn.Module) -> Mapping[str, Tensor]:
        """What init_from holds of all that learns."""
        if self.init_from is None:
            return {}
        learning = {name: param for name, param in model.named_parameters() if param.requires_grad}
        folder, stacked = Folder(self.init_from), expert_lora.in_file(model)
        there, ours = shapes(folder.tensors), [peft_name(name) for name in learning if name not in stacked]
        written = file_names(model.peft_config[ADAPTER], model, ours)  # type: ignore[index]
        names = {each: written[each] if written[each] in there else each for each in ours}  # PEFT saves a module's name
        parts = {name: (names[peft_name(name)], as_it_is) for name in learning if name not in stacked}
        expected = {there: learning[name].shape for name, (there, _) in parts.items()}
        for name, place in stacked.items():
            expected[place] = expert_lora.shape_in_file(name, learning[name])
            parts[name] = (place, partial(expert_lora.from_file, name, experts=len(learning[name])))
        self.check_stored(folder, model, expected)
        return Stored(folder.tensors, parts)

    def check_stored(self, folder: Folder, model: nn.Module, expected: Mapping[str, Size]) -> None:
        """Refuse a folder that does not fit. expected: name in PEFT's file -> shape."""
        config = expert_lora.portable(model.peft_config[ADAPTER], model)  # type: ignore[index]
        expert_lora.check_ranks(model, shapes(folder.tensors))
        folder.check(config, self.agree(), expected)

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them."""
        config = model.peft_config[ADAPTER]  # type: ignore[index]
        stacked = expert_lora.in_file(model)
        tensors = as_in_file(config, model, {peft_name(n): value for n, value in weights.items() if n not in stacked})
        tensors |= {place: expert_lora.to_file(name, weights[name]) for name, place in stacked.items()}
        return write_adapter(expert_lora.portable(portable(config, model), model), tensors, folder, base)

    def merge(self, model: nn.Module) -> nn.Module:
        """As PEFT merges; model: PEFT's own around the base, or what attach made of it."""
        merged: nn.Module = model.merge_and_unload()  # type: ignore[operator]
        return merged


def inject(model: nn.Module, config: Any, chosen: set[str], *, on_meta: bool = True) -> nn.Module:
    """Freeze model and put PEFT's layers around the modules that config names, on meta or CPU. What is new learns.

    chosen: the full names of those modules. Raises ValueError if PEFT has adapted others.
    """
    with uncompiled():
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING  # seconds: after what can be refused without it

    model.requires_grad_(False)
    with names_as_they_are(config, model), _patterns_of_parameters():
        tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](
            model, config, adapter_name=ADAPTER, low_cpu_mem_usage=on_meta
        )
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]  # autocast casts, without an fp32 copy
    injected: nn.Module = tuner.model
    check_landed(injected, chosen)
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
