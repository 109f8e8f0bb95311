"""Masks of dropout as a pure function of numbers: a counter-based generator in torch's integers, alike on each device.

An entry belongs to a row (a token) and a column (a feature of one call of one module). Both are 32-bit words drawn by
the same function that mixes them, so that an entry is found without those before it, whatever else is in the batch.
Source: the constants and shifts are MurmurHash3's finalizer (Appleby, public domain), with a key added between its two
products; the idea of a generator without a state is that of Salmon et al. 2011, "Parallel random numbers".
"""

import hashlib

import torch
from torch import Tensor

HALF = 2**16
"""Values of the half word that decides over one entry."""

AT_ONCE = 2**17
"""Words that are made together on a CPU: with one buffer beside them they stay in its cache."""

FIRST, SECOND = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32
ODD = 0x9E3779B9 - 2**32
"""2^32 over the golden ratio, as the int32 with the same bits."""


def stream(*words: object) -> int:
    """A 63-bit seed that is a pure function of words."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big") >> 1


def halves(number: int) -> tuple[int, int]:
    """The lower 64 bits of number as two int32."""
    low, high = number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def words(key: Tensor, more: Tensor, counter: Tensor) -> Tensor:
    """Mix three int32 tensors, which broadcast, into one int32 for each entry: uniform over all 2^32 values."""
    word = torch.add(key, counter)
    other = torch.empty_like(word)
    _fold(word, other, 16)
    word.mul_(FIRST)
    _fold(word, other, 13)
    word.add_(more)
    word.mul_(SECOND)
    _fold(word, other, 16)
    return word


def _fold(word: Tensor, other: Tensor, count: int) -> None:
    """Let word be word ^ (word >> count), without its sign; other: room for it."""
    torch.bitwise_right_shift(word, count, out=other)
    word.bitwise_xor_(other.bitwise_and_((1 << 32 - count) - 1))


def rows_of(keys: Tensor, positions: Tensor) -> Tensor:
    """The two words (2, T, 1) of each token: keys (2, T) of its example, and where it stands in it (T,), all int32."""
    low, high = keys
    first, second = words(low, high, positions), words(high, low, positions * ODD)
    return torch.stack([first, second])[:, :, None]


def columns_of(key: int, width: int) -> Tensor:
    """The words (1, ceil(width / 2)) of the features, two in each, of one call of a module, which key tells."""
    low, high = torch.tensor(halves(key), dtype=torch.int32)
    return words(low, high, torch.arange((width + 1) // 2, dtype=torch.int32))[None]


def threshold(p: float) -> int:
    """How many of the HALF values of a half word drop their entry: p to 16 bits, and 0 or all for p = 0 or 1 alone."""
    return round(p * HALF) if p in (0, 1) else min(max(round(p * HALF), 1), HALF - 1)


def kept(rows: Tensor, columns: Tensor, width: int, limit: int) -> Tensor:
    """True where an entry stays: (T, width) bool; rows (2, T, 1), columns (1, ceil(width / 2)), limit: of threshold."""
    mask = torch.empty(rows.shape[1], 2 * columns.shape[1], dtype=torch.bool, device=rows.device)
    step = max(1, AT_ONCE // columns.shape[1]) if rows.device.type == "cpu" else max(1, rows.shape[1])
    for part, place in zip(rows.split(step, 1), mask.split(step), strict=True):
        torch.ge(words(part[0], part[1], columns).view(torch.int16), limit - HALF // 2, out=place)
    return mask[:, :width]
