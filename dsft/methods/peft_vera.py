"""VeRA on PEFT's layers: two vectors learn per linear, between random projections that all linears share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn

from dsft.methods.peft_bridge import ADAPTER, Bridged, inject, peft_name, write_adapter
from dsft.methods.peft_folder import Folder
from dsft.methods.peft_landing import configured
from dsft.methods.stored import Stored, as_it_is, shapes
from dsft.protocols import Anatomy

SIDES = ("vera_A", "vera_B")


@dataclass(frozen=True, kw_only=True)
class Vera(Bridged):
    """y = W x + b * (B (d * (A x))): b (out,) from 0 and d (rank,) from d_initial learn. Numbers: out + rank a target.

    A (rank, largest in) and B (largest out, rank) are buffers, whole on every rank, drawn from projection_seed alone by
    PEFT's own function; each linear takes the part that fits. The result holds them.
    Source: Kopiczko, Blankevoort, Asano 2024, arXiv:2310.11454, equation 2; code: PEFT's tuners/vera.
    """

    rank: int
    d_initial: float
    dropout: float
    projection_seed: int
    target_modules: str | tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.rank < 1:
            raise ValueError(f"method.rank must be 1 or more, got {self.rank}")
        if self.d_initial == 0:
            raise ValueError("method.d_initial must not be 0, got 0: b starts there too, and neither would learn")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"method.dropout must be in [0, 1), got {self.dropout}")
        if self.projection_seed < 0:
            raise ValueError(f"method.projection_seed must be 0 or more, got {self.projection_seed}")

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Freeze the base and put PEFT's layers around the targets; the projections lose their values until initial."""
        dtype = model.get_submodule(anatomy.embedding).weight.dtype
        model = inject(model, *configured(self.target_modules, model, anatomy, self.config))
        for side in SIDES:
            shared = _shared(model, side)
            shared[ADAPTER] = torch.empty_like(shared[ADAPTER], device="meta", dtype=dtype)  # type: ignore[arg-type]
        return model

    def config(self, targets: list[str]) -> Any:
        """PEFT's own configuration object."""
        from peft import VeraConfig

        return VeraConfig(
            r=self.rank,
            d_initial=self.d_initial,
            vera_dropout=self.dropout,
            projection_prng_key=self.projection_seed,
            save_projection=True,
            target_modules=targets,
            bias="none",
            task_type="CAUSAL_LM",
        )

    def agree(self) -> Mapping[str, str]:
        """The rank, and the seed of projections that a file may leave out."""
        return {"r": "rank", "projection_prng_key": "projection_seed"}

    def stored(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The vectors, and the projections where the file has them; else they are drawn as PEFT does."""
        stored = super().stored(model)
        if not isinstance(stored, Stored):
            return stored
        there = shapes(stored.file)
        sides = {
            name: f"base_model.{side}" for name, _ in model.named_buffers() for side in SIDES if f".{side}." in name
        }
        held = {name: (key, as_it_is) for name, key in sides.items() if key in there}
        return Stored(stored.file, {**stored.parts, **held})

    def check_stored(self, folder: Folder, model: nn.Module, expected: Mapping[str, Size]) -> None:
        """With the projections, as far as the file has them."""
        there = shapes(folder.tensors)
        sides = {f"base_model.{side}": _shared(model, side)[ADAPTER].shape for side in SIDES}
        held = {name: shape for name, shape in sides.items() if name in there}
        super().check_stored(folder, model, {**expected, **held})

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """B = 0, d = d_initial; A and B as PEFT draws them: uniform in +-sqrt(6 / columns), A before B."""
        if ".vera_lambda_b." in name:
            return torch.zeros(param.shape)
        if ".vera_lambda_d." in name:
            return torch.full(param.shape, self.d_initial)
        from peft.tuners.vera.model import _kaiming_init

        generator = torch.Generator().manual_seed(self.projection_seed)
        shapes = [tuple(_shared(model, side)[ADAPTER].shape) for side in SIDES]
        drawn = {side: _kaiming_init(shape, generator) for side, shape in zip(SIDES, shapes, strict=True)}
        value: Tensor = next(value for side, value in drawn.items() if f".{side}." in name)
        return value

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
        """The vectors, and the projections once, as PEFT reads them."""
        tensors = {peft_name(name): value for name, value in weights.items()}
        tensors |= {f"base_model.{side}": _shared(model, side)[ADAPTER].cpu() for side in SIDES}
        return write_adapter(model.peft_config[ADAPTER], tensors, folder, base)  # type: ignore[index]


def _shared(model: nn.Module, side: str) -> Any:
    """The one dictionary of buffers that all layers hold."""
    return next(getattr(module, side) for module in model.modules() if hasattr(module, side))
