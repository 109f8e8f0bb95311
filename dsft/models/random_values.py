"""Random values for a model whose shape is known and whose weights are not wanted."""

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsft.models.build import base_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 2**20
"""Elements drawn from one generator: a rank draws only the blocks that its rows touch."""


class RandomValues:
    """Each tensor from (seed, name) alone: N(0, initializer_range) from 2-D on, ones for norms, zeros for biases."""

    unexpected: tuple[str, ...] = ()

    def __init__(self, model: "PreTrainedModel", seed: int, new: frozenset[str] = frozenset()) -> None:
        """new: names of tensors that are no part of the base, and so have no value here."""
        config = model.config.get_text_config()
        self._seed = seed
        self._std = float(getattr(config, "initializer_range", 0.02))
        self._tensors = {name: tensor for name, tensor in base_tensors(model).items() if name not in new}
        first: dict[int, str] = {}  # tied names share the value of the first
        self._drawn_as = {name: first.setdefault(id(tensor), name) for name, tensor in self._tensors.items()}

    def __contains__(self, name: str) -> bool:
        """True if this tensor of the base model has a value here."""
        return name in self._tensors

    def full(self, name: str, device: torch.device | None = None) -> Tensor:
        """The whole tensor in the base model's dtype, on device (CPU if None)."""
        meta = self._tensors[name]
        out = torch.empty(meta.shape, dtype=meta.dtype, device=device or "cpu")
        self.fill(name, out, 0)
        return out

    def fill(self, name: str, out: Tensor, start: int) -> None:
        """Write rows start, start + 1, ... of the tensor into out (any dtype and device; contiguous)."""
        meta = self._tensors[name]
        if meta.ndim < 2:
            out.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        row = meta.numel() // max(meta.shape[0], 1)
        flat, first = out.view(-1), start * row
        for block in range(first // BLOCK, -(-(first + flat.numel()) // BLOCK)):
            values = self._block(name, block, min(BLOCK, meta.numel() - block * BLOCK))
            low, high = max(first, block * BLOCK), min(first + flat.numel(), block * BLOCK + len(values))
            flat[low - first : high - first].copy_(values[low - block * BLOCK : high - block * BLOCK])

    def apart(self, name: str) -> bool:
        """Return True: see fill."""
        return True

    def _block(self, name: str, block: int, count: int) -> Tensor:
        digest = hashlib.sha256(f"{self._seed} {self._drawn_as[name]} {block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.empty(count).normal_(0.0, self._std, generator=generator)
