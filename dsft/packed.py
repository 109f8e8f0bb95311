"""Weights that a module keeps as bytes: how each is packed, and how the parts of dsft find them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dsft.moved import moved, shape_before

PACKED = "dsft_packed"
"""Name of a module's attribute that says which of its weights are kept as bytes."""


class Codec(ABC):
    """How a matrix is kept as bytes. One object serves all that a quantizer packs; a profiler may mark its decode."""

    @abstractmethod
    def shapes(self, out: int, inside: int) -> dict[str, tuple[int, ...]]:
        """Parts of a weight (out, inside) -> shape of each, uint8."""

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Weight (out, in), float, finite, on any device -> its parts, shaped as shapes says."""

    @abstractmethod
    def decode(self, parts: Sequence[Tensor], sides: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Weight (out, in) = sides in dtype, from its parts in the order of shapes, on their device (not meta)."""


class PackedWeight(ABC):
    """A weight that its module keeps as bytes, in parameters of the module.

    They are uint8 and never require grad, so that every strategy shards and gathers them byte for byte and nothing
    casts them; biases stay as they were.
    """

    codec: Codec
    dtype: torch.dtype
    """Type of the weight before it was packed."""
    compute_dtype: torch.dtype | None
    """Type of the unpacked weight and of products with it; None: the type of the other factor."""
    shape: tuple[int, ...]
    """Shape in the base: (out, in), or (E, ., .) of a stack of experts, whose sides its class may have exchanged."""
    parts: tuple[str, ...]
    """Names of the module's parameters that hold it."""

    at_once: int
    """Matrices that are unpacked at a time. Where a stack has more of them, the host waits for a GPU."""

    @abstractmethod
    def pack(self, matrices: Iterable[Tensor], first: int = 0) -> dict[str, Tensor]:
        """Matrices of the base, the one of a linear or those of a stack from number first on -> {name: bytes}, whole.

        Bytes of matrices that are not given are 0. Raises RuntimeError for one of another shape, or with numbers that
        are not finite.
        """

    @abstractmethod
    def unpack(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Weight in the base's shape, from whole parts in the order of their names; on meta if they are."""


class PackedStack(PackedWeight):
    """A stack of matrices (out, in) of experts that is kept as bytes."""

    @abstractmethod
    def product(self, module: nn.Module, x: Tensor, ends: Tensor) -> Tensor:
        """Rows x (S, in), sorted by expert, times the module's stack -> (S, out), as dsft.grouped.product has it."""


def packed_weights(module: nn.Module) -> Mapping[str, PackedWeight]:
    """Name of each weight of the module itself that is kept as bytes -> how; in the order in which its class has them.

    A module has them as an attribute called PACKED, which its quantizer put there; most have none.
    """
    found: Mapping[str, PackedWeight] = module.__dict__.get(PACKED, {})
    return found


def stacked(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape (E, ., .) of each stack of matrices of the module itself, packed or not, in the order of its class.

    Whole, also while ZeRO-3 has divided it.
    """
    packed = {name: weight.shape for name, weight in packed_weights(module).items()}
    own = {
        name: tuple(getattr(param, "ds_shape", shape_before(param, moved(module).get(name, 0))))
        for name, param in module.named_parameters(recurse=False)
    }
    return {name: shape for name, shape in {**own, **packed}.items() if len(shape) == 3}
