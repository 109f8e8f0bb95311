"""The index of a checkpoint: which tensors it holds, and where each piece of them lies in its files. No torch here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: where it begins in the tensor, its sizes, its file, and its first byte there."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class Held:
    """A tensor in a checkpoint. dtype: torch's name of it ("float32"); its pieces cover it."""

    dtype: str
    size: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        """Raise ValueError if the pieces are not those of a tensor of this size."""
        for piece in self.pieces:
            if not len(piece.offsets) == len(piece.sizes) == len(self.size):
                raise ValueError(f"a piece of {len(piece.sizes)} dimensions in a tensor of {len(self.size)}")
            ends = (offset + size for offset, size in zip(piece.offsets, piece.sizes, strict=True))
            if any(end > whole for end, whole in zip(ends, self.size, strict=True)):
                raise ValueError("a piece that ends outside of its tensor")
        if sum(math.prod(piece.sizes) for piece in self.pieces) != math.prod(self.size):
            raise ValueError("pieces that do not cover their tensor")


Index = Mapping[str, Held]
"""Name -> tensor."""


def plain(index: Index) -> dict[str, Any]:
    """Return index as JSON has it."""
    return {
        name: {
            "dtype": held.dtype,
            "size": held.size,
            "pieces": [[piece.file, piece.start, piece.offsets, piece.sizes] for piece in held.pieces],
        }
        for name, held in index.items()
    }


def understood(content: Mapping[str, Any]) -> Index:
    """Return the index that JSON spells. Raises ValueError, KeyError or TypeError if it spells none."""
    return {
        name: Held(
            dtype=text(held["dtype"]),
            size=numbers(held["size"]),
            pieces=tuple(
                Piece(file=text(file), start=number(start), offsets=numbers(offsets), sizes=numbers(sizes))
                for file, start, offsets, sizes in held["pieces"]
            ),
        )
        for name, held in content.items()
    }


def text(value: object) -> str:
    """Return value, which must be text, else raise TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of text")
    return value


def number(value: object) -> int:
    """Return value, which must be an integer and not negative, else raise TypeError or ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} in place of a number")
    if value < 0:
        raise ValueError("a negative number")
    return value


def numbers(values: object) -> tuple[int, ...]:
    """Return values, which must be a list or a tuple of such numbers."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{type(values).__name__} in place of numbers")
    return tuple(number(value) for value in values)
