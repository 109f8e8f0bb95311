"""An adapter's folder in PEFT's format, to start from: does it fit, and what are its values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Size, Tensor

AGREE = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Keys of adapter_config.json that decide what its numbers mean."""

OURS = {
    "r": "rank", "lora_alpha": "alpha", "use_rslora": "options.use_rslora", "use_dora": "options.use_dora",
    "rank_pattern": "options.rank_pattern", "alpha_pattern": "options.alpha_pattern",
}  # fmt: skip
"""Their names under method."""


@dataclass(frozen=True)
class Folder:
    """path: where adapter_config.json and adapter_model.safetensors are, written by a run or by PEFT."""

    path: str

    def check(self, config: Any, expected: Mapping[str, Size]) -> None:
        """Refuse a folder of another configuration, or of other tensors. expected: name in PEFT's file -> shape."""
        from safetensors import safe_open

        theirs = self._config()
        for key in AGREE:
            mine, other = getattr(config, key), theirs.get(key)
            if (mine or None) != (other or None):  # absent, null, {} and false all mean none
                way = f"set method.{OURS[key]} to it" if key in OURS else "take one that a LoRA run has left"
                raise ValueError(f"method.init_from must agree in {key}, {mine}, got {other}; {way}")
        start = theirs.get("init_lora_weights", True)
        if start not in (True, False, "gaussian"):
            raise ValueError(
                f"method.init_from must hold a plain adapter, got init_lora_weights={start}, whose base was changed "
                "too; convert it with PEFT's path_initial_model_for_weight_conversion"
            )
        with safe_open(self._tensors(), "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # no dict
        for name in sorted(shapes.keys() ^ expected.keys()):
            whose = "is only there" if name in shapes else "is missing there"
            raise ValueError(
                f"method.init_from must agree in target_modules, {name} {whose}; set method.target_modules to the "
                "modules of the adapter"
            )
        for name, shape in expected.items():
            if tuple(shape) != shapes[name]:
                raise ValueError(
                    f"method.init_from must be an adapter of this model, {name} is {list(shapes[name])} there and "
                    f"{list(shape)} here; take the model that it was trained on"
                )

    def tensor(self, name: str) -> Tensor:
        """One tensor of the file, fp32, on CPU."""
        from safetensors import safe_open

        with safe_open(self._tensors(), "pt") as file:
            value: Tensor = file.get_tensor(name).float()
        return value

    def _config(self) -> dict[str, Any]:
        file = Path(self.path).expanduser() / "adapter_config.json"
        if not file.is_file():
            raise ValueError(
                f"method.init_from must be a folder with adapter_config.json, got {self.path}; give RUN/adapter"
            )
        config: dict[str, Any] = json.loads(file.read_text())
        return config

    def _tensors(self) -> Path:
        file = Path(self.path).expanduser() / "adapter_model.safetensors"
        if not file.is_file():
            raise ValueError(
                f"method.init_from must be a folder with adapter_model.safetensors, got {self.path}; let PEFT save it "
                "again with safe_serialization"
            )
        return file
