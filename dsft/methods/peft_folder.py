"""An adapter's folder in PEFT's format, to start from: does it fit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Size

from dsft.methods.stored import PEFT, TENSORS, place, shapes


@dataclass(frozen=True)
class Folder:
    """path: a run's folder, its result, or any folder with adapter_config.json and adapter_model.safetensors."""

    path: str

    @property
    def tensors(self) -> Path:
        """The file with what was learned. Raises ValueError if there is none."""
        return place(self.path, PEFT) / TENSORS

    def check(self, config: Any, agree: Mapping[str, str], expected: Mapping[str, Size]) -> None:
        """Refuse a folder of another configuration, or of other tensors.

        config: PEFT's, of the method as it is here; agree: its keys that decide what the numbers mean -> our keys under
        method; expected: name in PEFT's file -> shape.
        """
        theirs = self.config()
        self.check_type(str(config.peft_type.value), theirs)
        for key, ours in agree.items():
            mine, other = getattr(config, key), theirs.get(key)
            if (mine or None) != (other or None):  # absent, null, {} and false all mean none
                raise ValueError(f"method.init_from must agree in {key}, {mine}, got {other}; set method.{ours} to it")
        start = theirs.get("init_lora_weights", True)
        if start not in (True, False, "gaussian"):
            raise ValueError(
                f"method.init_from must hold a plain adapter, got init_lora_weights={start}, whose base was changed "
                "too; convert it with PEFT's path_initial_model_for_weight_conversion"
            )
        self.check_tensors(expected)

    def check_type(self, wanted: str, theirs: Mapping[str, Any]) -> None:
        """Refuse an adapter of another of PEFT's types."""
        found = theirs.get("peft_type")
        if found != wanted:
            raise ValueError(
                f"method.init_from must agree in peft_type, {wanted}, got {found}; take the method that it was "
                "trained with, or an adapter of this one"
            )

    def check_tensors(self, expected: Mapping[str, Size]) -> None:
        """Refuse a file without a tensor of expected, with another one, or with one of another shape."""
        found = shapes(self.tensors)
        for name in sorted(found.keys() ^ expected.keys()):
            whose = "is only there" if name in found else "is missing there"
            raise ValueError(
                f"method.init_from must agree in target_modules, {name} {whose}; set method.target_modules to the "
                "modules of the adapter"
            )
        for name, shape in expected.items():
            if tuple(shape) != found[name]:
                raise ValueError(
                    f"method.init_from must be an adapter of this model, {name} is {list(found[name])} there and "
                    f"{list(shape)} here; take the model that it was trained on"
                )

    def config(self) -> dict[str, Any]:
        """What is in adapter_config.json."""
        file = place(self.path, PEFT) / PEFT
        try:
            config: dict[str, Any] = json.loads(file.read_text())
            config.keys()
        except (ValueError, RecursionError, AttributeError):
            raise ValueError(f"method.init_from must hold whole files, got {file} damaged; copy it again") from None
        return config
