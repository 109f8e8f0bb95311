"""NF4: 4-bit levels at the quantiles of a normal, by bitsandbytes. QLoRA, Dettmers et al. 2023, arXiv:2305.14314."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from dsft.imports import uncompiled
from dsft.packed import Codec
from dsft.protocols import Anatomy, Quantizer
from dsft.quantizers.convert import check_unpack_mib, convert
from dsft.quantizers.footprint import footprint, require_packed
from dsft.quantizers.packed import ComputeDtype, floats, raw_bytes, read_compute_dtype

BLOCK = 64
"""Weights that share one absmax, counted along the flattened weight (QLoRA, section 3)."""

NESTED_BLOCK = 256
"""Absmax values that share one scale under double quantization (QLoRA, section 3)."""


CHUNK = 2**20
"""Weights packed at once, a multiple of BLOCK: bounds the temporaries, which are several times their size."""


@dataclass(frozen=True, kw_only=True)
class NF4(Quantizer):
    """Weights in 4 bits: per block of 64 the nearest of 16 levels of w / absmax; equal to bitsandbytes' Linear4bit."""

    double_quant: bool
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
        codec, compute_dtype = NF4Codec(double_quant=self.double_quant), read_compute_dtype(self.compute_dtype)
        return convert(model, anatomy, "nf4", codec, compute_dtype, experts=self.experts, unpack_mib=self.unpack_mib)

    def require(self, model: nn.Module, anatomy: Anatomy) -> None:
        """See Quantizer."""
        require_packed(model, anatomy, "nf4", experts=self.experts)

    def report(self, model: nn.Module) -> str:
        """One line: the share of parameters and bytes packed, and what stays."""
        return str(footprint(model))


class NF4Codec(Codec):
    """payload (ceil(N / 2),): two levels a byte, N = out * in, the last block may be short.

    With double quantization absmax (blocks,) holds a level of bitsandbytes' 8-bit dynamic map per block and nested
    (1 + ceil(blocks / 256), 4) the fp32 mean of the absmax, then one fp32 scale per 256 blocks, as bytes; without,
    absmax (blocks, 4) holds fp32 as bytes. 4.127 and 4.5 bits per parameter.
    """

    def __init__(self, *, double_quant: bool) -> None:
        self.double_quant = double_quant

    def shapes(self, out: int, inside: int) -> dict[str, tuple[int, ...]]:
        """See Codec."""
        count = out * inside
        blocks = -(-count // BLOCK)
        if not self.double_quant:
            return {"payload": (-(-count // 2),), "absmax": (blocks, 4)}
        return {"payload": (-(-count // 2),), "absmax": (blocks,), "nested": (1 + -(-blocks // NESTED_BLOCK), 4)}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """See Codec."""
        bnb = _bitsandbytes()
        chunks = [
            bnb.quantize_4bit(chunk.float(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
            for chunk in weight.detach().reshape(-1).split(CHUNK)
        ]
        parts = {"payload": torch.cat([payload.reshape(-1) for payload, _ in chunks])}
        absmax = torch.cat([state.absmax for _, state in chunks])
        if not self.double_quant:
            return {**parts, "absmax": raw_bytes(absmax)}
        offset = absmax.mean()
        levels, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        return {**parts, "absmax": levels, "nested": raw_bytes(torch.cat([offset.reshape(1), nested.absmax]))}

    def decode(self, parts: Sequence[Tensor], sides: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Weight (out, in) by bitsandbytes, its QuantState built from the bytes for this one call."""
        bnb = _bitsandbytes()
        payload, absmax, *nested = parts
        wide = dtype is torch.float64
        state = bnb.QuantState(
            absmax=absmax if nested else floats(absmax),
            shape=torch.Size(sides),
            code=_levels(payload.device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=torch.float32 if wide else dtype,
        )
        if nested:
            values = floats(nested[0])
            state.offset, state.nested = values[0], True
            state.state2 = bnb.QuantState(
                absmax=values[1:].contiguous(),
                blocksize=NESTED_BLOCK,
                code=_dynamic_map(payload.device),
                dtype=torch.float32,
            )
        weight: Tensor = bnb.dequantize_4bit(payload.reshape(-1, 1), state)
        # a payload of one byte comes back transposed (bitsandbytes' old calling form)
        return weight.reshape(sides).to(dtype)


@cache
def _levels(device: torch.device) -> Tensor:
    """The 16 levels (16,) float32, -1 to 1."""
    levels: Tensor = _bitsandbytes().get_4bit_type("nf4", device=device)
    return levels


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 levels (256,) float32 of bitsandbytes' 8-bit dynamic map. Dettmers et al. 2022, arXiv:2110.02861."""
    levels: Tensor = _bitsandbytes().create_dynamic_map().to(device)
    return levels


@cache
def _bitsandbytes() -> ModuleType:
    """bitsandbytes.functional, imported at first use."""
    with uncompiled():
        import bitsandbytes.functional as functional
    module: ModuleType = functional
    return module
