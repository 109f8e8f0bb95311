"""Numbers of 2, 4 or 8 bits as bytes."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers (out, in) int8 of so many bits -> (out, ceil(in bits / 8)) uint8, the first in the lowest bits.

    A number is kept plus 2^(bits-1); what is left of a row's last byte is zeros.
    """
    each = 8 // bits
    kept = (numbers.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    kept = pad(kept, (0, -kept.shape[1] % each)).unflatten(1, (-1, each))
    packed: Tensor = kept[..., 0].clone()
    for place in range(1, each):
        packed |= kept[..., place] << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of pack: (out, columns) int8."""
    each = 8 // bits
    kept = torch.stack([(packed >> (bits * place)) & (2**bits - 1) for place in range(each)], dim=-1)
    numbers: Tensor = kept.flatten(1)[:, :columns].to(torch.int16) - 2 ** (bits - 1)
    return numbers.to(torch.int8)
