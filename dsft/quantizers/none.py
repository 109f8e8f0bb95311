"""No quantization: every linear stays as the model has it."""

from dataclasses import dataclass

from torch import nn

from dsft.protocols import Anatomy, Quantizer


@dataclass(frozen=True, kw_only=True)
class Unquantized(Quantizer):
    """Packs nothing."""

    def convert(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Return the model unchanged."""
        return model

    def report(self, model: nn.Module) -> str:
        """Return nothing: nothing is packed."""
        return ""
