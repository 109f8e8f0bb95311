"""int8: each row of a weight scaled by its absmax to [-127, 127]. LLM.int8, Dettmers et al. 2022, arXiv:2208.07339."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dsft.packed import Codec
from dsft.protocols import Anatomy, Quantizer
from dsft.quantizers.convert import check_unpack_mib, convert
from dsft.quantizers.footprint import footprint, require_packed
from dsft.quantizers.packed import ComputeDtype, floats, raw_bytes, read_compute_dtype

CHUNK = 2**20
"""Weights packed at once."""

LEVELS = 127
"""Largest magnitude of a stored integer; -128 is not used (LLM.int8(), section 2)."""


@dataclass(frozen=True, kw_only=True)
class Int8(Quantizer):
    """Weights in 8 bits, products in the compute dtype.

    From LLM.int8() it takes how a weight is stored: per row w / absmax * 127, rounded, and absmax in fp32; so
    |w - unpacked w| <= absmax / 254. What it leaves out: inputs are not quantized, products are not integer, and so no
    outlier column needs 16 bits (the paper's threshold of 6.0 has no counterpart here).
    """

    compute_dtype: ComputeDtype
    experts: bool = False
    unpack_mib: int = field(default=16, repr=False)  # what names a packed base does not name this

    def __post_init__(self) -> None:
        """Refuse an unknown compute_dtype and a negative unpack_mib."""
        read_compute_dtype(self.compute_dtype)
        check_unpack_mib(self.unpack_mib)

    @property
    def packs_experts(self) -> bool:
        """See Quantizer."""
        return self.experts

    def convert(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Keep the blocks' linears and experts as bytes. Raises ValueError if there are none, or too few."""
        compute_dtype = read_compute_dtype(self.compute_dtype)
        return convert(
            model, anatomy, "int8", Int8Codec(), compute_dtype, experts=self.experts, unpack_mib=self.unpack_mib
        )

    def require(self, model: nn.Module, anatomy: Anatomy) -> None:
        """See Quantizer."""
        require_packed(model, anatomy, "int8", experts=self.experts)

    def report(self, model: nn.Module) -> str:
        """One line: the share of parameters and bytes packed, and what stays."""
        return str(footprint(model))


class Int8Codec(Codec):
    """payload (out, in): int8 as bytes; absmax (out, 4): one fp32 per row as bytes. 8 + 32 / in bits per parameter."""

    def shapes(self, out: int, inside: int) -> dict[str, tuple[int, ...]]:
        """See Codec."""
        return {"payload": (out, inside), "absmax": (out, 4)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """See Codec."""
        payload = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        absmax = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
        rows = max(1, CHUNK // weight.shape[1])
        for first in range(0, weight.shape[0], rows):  # in parts: the temporaries are several times their size
            part = weight[first : first + rows].detach().float()
            largest = part.abs().amax(dim=1, keepdim=True)
            share = part / largest.clamp(min=torch.finfo(torch.float32).tiny)  # a row of zeros stays zeros
            payload[first : first + rows] = torch.round(share * LEVELS).to(torch.int8)
            absmax[first : first + rows] = largest
        return {"payload": payload.view(torch.uint8), "absmax": raw_bytes(absmax)}

    def decode(self, parts: Sequence[Tensor], sides: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Weight (out, in): payload * absmax / 127, computed in fp32 and rounded once to dtype."""
        payload, absmax = parts
        scale = (floats(absmax) / LEVELS).unsqueeze(1)  # (out, 1)
        weight = torch.empty(sides, dtype=dtype, device=payload.device)
        return torch.mul(payload.view(torch.int8), scale, out=weight)
