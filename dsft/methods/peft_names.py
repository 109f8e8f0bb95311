"""Names of an adapter's tensors in PEFT's file: those that its loader reads back as the modules that they are of.

PEFT's loader renames the tensors of a LoRA as transformers renames those of a checkpoint, by patterns that may match
a module's own name too: in Laguna `mlp.shared_expert.`, whose last dot stands for any letter, makes of shared_experts
a module that is not there, and the loader starts that part of the adapter anew with no more than a warning. The name
that a checkpoint has for such a module is read back as the module.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "base_model.model."
"""PEFT's own name for the model, at the beginning of each name in its file."""


def file_names(config: Any, model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Name -> name in the file, of each of names that PEFT's loader reads back at all.

    config: PEFT's; model: with its adapter or without; names: as parameters have them, without the adapter's name.
    """
    found = {name: name for name in _kept(config, model, {name: name for name in names})}
    lost = [name for name in names if name not in found]
    if lost:
        published = {name: _published(model, name) for name in lost}
        found |= {name: published[name] for name in _kept(config, model, published)}
    return found


def as_in_file(config: Any, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their names in the file; all of them have one, since no linear without one is adapted."""
    names = file_names(config, model, tensors)
    return {names[name]: value for name, value in tensors.items()}


def unread(config: Any, model: nn.Module, modules: Iterable[str]) -> set[str]:
    """Those of modules whose LoRA no name in the file would bring back."""
    names = {f"{PREFIX}{module}.lora_A.weight": module for module in modules}
    return {names[name] for name in names.keys() - file_names(config, model, names).keys()}


def _kept(config: Any, model: nn.Module, written: Mapping[str, str]) -> set[str]:
    """Names that come out of PEFT's loader with the tensor that the file has under their written name."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    marks = {name: float(mark) for mark, name in enumerate(written)}
    file = {there: torch.full((1, 1), marks[name]) for name, there in written.items()}
    read: dict[str, Tensor] = convert_peft_adapter_state_dict_for_transformers(model, config, file)
    return {name for name in written if name in read and bool((read[name] == marks[name]).all())}


def _published(model: Any, name: str) -> str:
    """The name that a checkpoint of model would have for name."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted = revert_weight_conversion(model, {name.removeprefix(PREFIX): torch.zeros(1, 1)})
    return f"{PREFIX}{next(iter(reverted))}"
