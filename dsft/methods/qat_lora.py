"""QAT with LoRA: base plus product is rounded in each linear of the blocks, and the product's factors learn."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsft.methods.branches import grow
from dsft.methods.grid import STEM, Grid, Scheme, grid_of, held
from dsft.methods.peft_lora import LinearLora
from dsft.methods.rounded import Rounded
from dsft.protocols import Anatomy


@dataclass(frozen=True, kw_only=True)
class QatLora(LinearLora):
    """y = x round(W + s B A)^T + b, W frozen, B = 0 at the start; the gradient of round(W + s B A) is the sum's.

    round: per group of inputs (k - z) t, k of 2, 4 or 8 bits, t fp32, and z = 0 but with int2, found anew from the sum
    at each use; with 8da4w x is rounded too, to 8 bits per token. Linears of the blocks that are no target compute
    x round(W)^T. Parameters: LoRA's, rank x (in + out) per target. RUN/adapter is in PEFT's format, for the base as it
    is. dsft export --to merged adds the product to the base and rounds: to the bit the weights of training, if
    libraries and hardware add B A up alike, with the numbers and scales that method=qat leaves.
    Source: Jacob et al. 2018, arXiv:1712.05877; LoRA, Hu et al. 2021, arXiv:2106.09685; code: torchao's qat, PEFT.
    """

    scheme: Scheme
    group_size: int | Literal["auto"]

    def __post_init__(self) -> None:
        """Refuse a grid that there is not, and a length of rows apart, whose product would have to be rounded twice."""
        super().__post_init__()
        grid_of(self.scheme, self.group_size)
        if self.options.items() >= {"use_dora": True}.items():
            raise ValueError("method.options.use_dora must be left out with qat_lora, got true; take method=qat")

    @property
    def grid(self) -> Grid:
        """What sums are rounded to."""
        return grid_of(self.scheme, self.group_size)

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Freeze the base and put the layers in; the linears of the blocks round."""
        names = self.grid.linears(model, anatomy)
        model = super().attach(model, anatomy)
        self._round(model, names)
        return model

    def _round(self, model: nn.Module, names: list[str]) -> None:
        """Make the linears called so in model round, those in PEFT's layers the sum."""
        from dsft.methods.rounded_lora import RoundedLora

        for name in names:
            module: Any = model.get_submodule(name)
            if hasattr(module, "base_layer"):
                module.__class__ = RoundedLora
            else:
                grow(module, Rounded)
            module.grid = self.grid

    @property
    def plain(self) -> bool:
        """False: a loader of PEFT's does not round, and what rounds after it knows PEFT's linears alone."""
        return False

    def finished(
        self, model: nn.Module, anatomy: Anatomy, name: str, value: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Sums as the forward pass had them last, and their numbers and scales."""
        return held(self.grid, model, anatomy, name, value)

    @property
    def beside(self) -> tuple[str, Mapping[str, str]]:
        """Numbers and scales."""
        return STEM, self.grid.notes

    def restored(self, model: nn.Module, anatomy: Anatomy, folder: Path) -> nn.Module:
        """PEFT's model, rounding."""
        base: Any = model.get_base_model()  # type: ignore[operator]
        self._round(base, [name for name in anatomy.linears if self.grid.rounds(base, anatomy, name)])
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        """W + s B A of factors as the forward pass had them."""
        from dsft.methods.rounded_lora import factors_in

        factors_in(model, model.config.dtype)  # type: ignore[union-attr, arg-type]
        return super().merge(model)

    @property
    def starts_as_base(self) -> bool:
        """False: the base's weights are rounded from the first step on."""
        return False
