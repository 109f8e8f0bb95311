"""Any of PEFT's layer adapters by the name of its configuration class; PEFT itself gives the first values, on CPU."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn

from dsft.imports import uncompiled
from dsft.locate import Allowed, ForeignNameError, locate
from dsft.methods.peft_bridge import ADAPTER, Bridged, inject, peft_name
from dsft.methods.peft_folder import Folder
from dsft.methods.peft_landing import configured
from dsft.methods.peft_targets import nearest
from dsft.methods.stored import Stored, as_it_is, shapes
from dsft.protocols import Anatomy

ELSEWHERE = {"LORA": "method=lora", "VERA": "method=vera", "IA3": "method=ia3"}
"""Types of PEFT that have a method of their own here."""

CALLED = {
    "ADALORA": "its ranks are allocated while it trains",
    "POLY": "it wants the number of a task with each example",
    "TRAINABLE_TOKENS": "it changes rows of the embedding, and no linear",
    "OSF": "its gradients are projected while it trains",
    "XLORA": "it mixes adapters that are trained already",
}
"""Types that want more of a trainer than to move what learns, and what that is."""

OURS = ("target_modules", "task_type", "peft_type", "inference_mode", "modules_to_save", "base_model_name_or_path")
"""Keys of PEFT's classes that are not the user's here."""

FREE = (*OURS, "revision", "auto_mapping", "peft_version", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys that do not change what an adapter's numbers mean; so do those of dropout and, where they are no word, of first
values."""


@dataclass(frozen=True, kw_only=True)
class Peft(Bridged):
    """type: the full name of a configuration class, as peft.LoHaConfig; options: its keys, as PEFT names them.

    Parameters, formula and source are those of PEFT's tuners/NAME. First values: a linear like the target, with its
    weight, gets the adapter from PEFT on CPU, from a generator that (seed, name) has seeded: each start is PEFT's own
    and the number of ranks changes nothing. Adapters whose layers share a tensor are refused. Whether the start is the
    base is up to PEFT: most are, FourierFT is with init_weights=true.
    """

    type: str
    target_modules: str | tuple[str, ...]
    options: dict[str, Any]

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Freeze the base and put PEFT's layers around the targets; nothing has a value until initial."""
        with uncompiled():
            config, chosen = configured(self.target_modules, model, anatomy, self.config)
        model = self._inject(model, config, chosen, on_meta=True)
        self._check_unshared(model)
        self._check_dropout(model)
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:  # new, and perhaps drawn by this rank alone
                    module._buffers[key] = torch.empty_like(buffer, device="meta")
        return model

    def config(self, targets: list[str]) -> Any:
        """PEFT's own configuration object."""
        cls = self._class()
        known = {field.name for field in fields(cls)} - set(OURS)
        for key in self.options:
            if key not in known:
                raise ValueError(f"method.options.{key} is no key of {self.type} here{nearest(key, known)}")
        try:
            return cls(target_modules=targets, task_type="CAUSAL_LM", **self.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"method.options: {' '.join(str(error).split())}") from error

    def agree(self) -> Mapping[str, str]:
        """All keys that the class has, but FREE."""
        names = [field.name for field in fields(self._class())]
        return {name: f"options.{name}" for name in names if name not in FREE and "dropout" not in name}

    def stored(self, model: nn.Module) -> Mapping[str, Tensor]:
        """What learns, and what of the layers' buffers the file has."""
        stored = super().stored(model)
        if not isinstance(stored, Stored):
            return stored
        there = shapes(stored.file)
        held = {name: (peft_name(name), as_it_is) for name in _buffers(model) if peft_name(name) in there}
        return Stored(stored.file, {**stored.parts, **held})

    def check_stored(self, folder: Folder, model: nn.Module, expected: Mapping[str, Size]) -> None:
        """With the buffers, as far as the file has them."""
        there = shapes(folder.tensors)
        held = {peft_name(name): buffer.shape for name, buffer in _buffers(model).items()}
        super().check_stored(folder, model, {**expected, **{key: held[key] for key in held if key in there}})

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """PEFT's own first value; all of one layer are made at the first question and forgotten with the last."""
        path, layer = _layer_of(model, name)
        if not hasattr(layer, "first_values"):
            weight = read(f"{path}.base_layer").float()
            layer.first_values = self._made(path, weight, bias=layer.base_layer.bias is not None)
        value: Tensor = layer.first_values.pop(name.removeprefix(f"{path}."))
        if not layer.first_values:
            del layer.first_values
        return value

    def _made(self, path: str, weight: Tensor, *, bias: bool) -> dict[str, Tensor]:
        """What PEFT adds to a linear (out, in) of this name, by name within the layer."""
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
        linear.weight.data.copy_(weight)
        twin = nn.Module()
        parent, _, leaf = path.rpartition(".")
        here = twin
        for part in parent.split("."):
            here.add_module(part, nn.Module())
            here = here.get_submodule(part)
        here.add_module(leaf, linear)
        layer = self._inject(twin, self.config([path]), {path}, on_meta=False).get_submodule(path)
        if not torch.equal(linear.weight, weight):
            raise ValueError(f"method.options must leave the base as it is, and {self.type} changes it with these")
        held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        return {name: value.detach() for name, value in held.items() if not name.startswith("base_layer.")}

    def _inject(self, model: nn.Module, config: Any, chosen: set[str], *, on_meta: bool) -> nn.Module:
        try:
            return inject(model, config, chosen, on_meta=on_meta)
        except Exception as error:  # whatever one of PEFT's thirty tuners can raise over targets that do not suit it
            said = " ".join(str(error).split())[:300]
            raise ValueError(
                f"method.type={self.type} does not fit method.target_modules or method.options here: {said}"
            ) from error

    def _class(self) -> Any:
        """The class that type names: PEFT's own, or one that a package adds which may be named."""
        try:
            found = locate(self.type, Allowed(also=("peft",)))
        except ForeignNameError as error:
            raise ForeignNameError(
                f"method.type must name a configuration class, as peft.LoHaConfig, got {self.type} {error}"
            ) from error
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"method.type must name a configuration class, as peft.LoHaConfig, got {self.type} ({error})"
            ) from error
        from peft import PeftConfig

        if not (isinstance(found, type) and issubclass(found, PeftConfig)):
            raise ValueError(f"method.type must name a class of PEFT's configurations, got {self.type}")
        self._check_type(found)
        return found

    def _check_type(self, cls: Any) -> None:
        """Refuse what is no adapter of single linears."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

        type_of = {found: kind for kind, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if cls not in type_of or "target_modules" not in {field.name for field in fields(cls)}:
            raise ValueError(f"method.type must be an adapter of linears, got {self.type}; take peft.LoHaConfig")
        kind = str(type_of[cls].value)
        if kind in ELSEWHERE:
            raise ValueError(f"method.type must not be {self.type}: it has a method of its own; take {ELSEWHERE[kind]}")
        if kind in CALLED:
            raise ValueError(f"method.type must be an adapter that only learns, got {self.type}: {CALLED[kind]}")
        if PEFT_TYPE_TO_TUNER_MAPPING[type_of[cls]].uses_shared_state:
            raise ValueError(self._shares())

    def _check_unshared(self, model: nn.Module) -> None:
        """A tensor in two layers is one that no block can shard, and whose start no layer can give alone."""
        seen: set[int] = set()
        everywhere: dict[str, Any] = {"remove_duplicate": False}
        for name, tensor in [*model.named_parameters(**everywhere), *model.named_buffers(**everywhere)]:
            if self.kept(name) and id(tensor) in seen:
                raise ValueError(self._shares())
            seen.add(id(tensor))

    def _check_dropout(self, model: nn.Module) -> None:
        """Refuse dropout that is no module of the adapter's: PEFT draws it anew for each batch."""
        drops = any(isinstance(m, nn.Dropout) and m.p > 0 and _is_adapters(name) for name, m in model.named_modules())
        for key, value in self.options.items():
            if "dropout" in key and value and not drops:
                raise ValueError(
                    f"method.options.{key} must be 0 with {self.type}, got {value}: PEFT draws it for a whole batch, "
                    "so that micro-batches would change the loss; leave it out"
                )

    def _shares(self) -> str:
        return f"method.type must be an adapter whose layers share nothing, got {self.type}; take peft.LoHaConfig"

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
        """With what the layers keep in buffers (chosen indices, norms of the base), which are whole on every rank."""
        kept = {name: value.cpu() for name, value in _buffers(model).items()}
        return super().save(model, {**weights, **kept}, folder, base)

    def kept(self, name: str) -> bool:
        """What an adapter holds beside what learns is in its file too."""
        return _is_adapters(name)


def _is_adapters(name: str) -> bool:
    return ADAPTER in name.split(".")


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of the adapter's layers that a file holds."""
    held = {
        f"{path}.{key}": buffer
        for path, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in held.items() if _is_adapters(name)}


def _layer_of(model: nn.Module, name: str) -> tuple[str, Any]:
    """The adapted linear that a tensor of this name is in: its name, and itself."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        layer = model.get_submodule(path)
        if hasattr(layer, "base_layer") and hasattr(layer, "active_adapters"):
            return path, layer
    raise RuntimeError(f"{name} is new and in no adapted linear: {ADAPTER} cannot start")
