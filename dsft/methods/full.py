"""Full fine-tuning: every parameter learns."""

from dataclasses import dataclass

from torch import nn

from dsft.protocols import Anatomy, Method


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """No parameter is added; the result is a whole model."""

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Let everything learn."""
        return model.requires_grad_(True)

    @property
    def whole(self) -> bool:
        """The result is a whole model."""
        return True
