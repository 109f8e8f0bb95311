"""Tiny models for tests and first tries: a real folder, written once into the cache from a seed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsft.models.cache import save_model, written_once
from dsft.models.files import ModelFiles
from dsft.models.numbers import config_of
from dsft.models.source import Pretrained, require_init

if TYPE_CHECKING:
    from torch import nn

LAYOUT = 1
"""Raised when the weights or the tokenizer below change, so that an old cached folder is not taken for the new one."""


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """path: a folder to use instead, or null; config: the architecture's numbers; seed: of its fixed weights."""

    path: str | None
    init: Literal["pretrained", "random"]
    seed: int
    config: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse values that name no model."""
        require_init(self.init)

    def check(self, *, planning: bool = False) -> None:
        """Refuse a folder that cannot be loaded; no torch, no network."""
        if self.path is not None:
            self._at(self.path).check(planning=planning)

    def resolve(self, *, planning: bool = False) -> ModelFiles:
        """The model's folder, written at first use."""
        return self._at(self.path or str(self._folder())).resolve(planning=planning)

    def _folder(self) -> Path:
        config_of(self.config)  # also of a folder that is there: an older dsft wrote some that no rank can run
        numbers = json.dumps([LAYOUT, self.seed, self.config], sort_keys=True)
        digest = hashlib.sha256(numbers.encode()).hexdigest()[:12]
        return written_once(f"tiny-{self.config['model_type']}-{digest}", self._write)

    def _at(self, path: str) -> Pretrained:
        return Pretrained(
            path=path, init=self.init, revision=None, trust_remote_code=False, config_of=None, config=None
        )

    def _write(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from dsft.models.bytes_tokenizer import byte_tokenizer
        from dsft.models.progress import no_progress_bars

        model = AutoModelForCausalLM.from_config(config_of(self.config), dtype=torch.float32)
        fill_fixed(model, self.seed)
        with no_progress_bars():
            save_model(model, folder)
        byte_tokenizer().save_pretrained(folder)


def fill_fixed(model: "nn.Module", seed: int) -> None:
    """Fixed random values, each from (seed, name), large enough that a few steps at lr 1e-3 move the loss.

    Matrices (out, in) and experts (E, out, in) get a standard deviation of 1 / sqrt(in), so that the signal keeps its
    size from layer to layer; the embedding 1; norms are 1. A buffer that a router adds to its scores gets 1, so that
    some experts are never chosen.
    """
    import torch

    from dsft.models.build import persistent_buffers

    for name, param in model.named_parameters():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        with torch.no_grad():
            if param.ndim < 2:
                param.fill_(1.0)
            elif "embed" in name:
                param.normal_(0.0, 1.0, generator=generator)
            else:
                param.normal_(0.0, param.shape[-1] ** -0.5, generator=generator)
    for name, buffer in persistent_buffers(model).items():
        if not name.endswith("correction_bias"):
            continue
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        buffer.normal_(0.0, 1.0, generator=generator)
