"""Weights on a grid of a few levels: torchao's rounding, its straight-through gradient, its integers and linears.

Source: Jacob et al. 2018, arXiv:1712.05877; code: torchao 0.18, quantization/quant_primitives.py. torchao is an extra,
imported when it is used.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsft.imports import uncompiled
from dsft.methods.bits import pack, unpack
from dsft.packed import packed_weights
from dsft.protocols import Anatomy

Scheme = Literal["int8", "int4", "8da4w", "int2"]

BITS: dict[str, int] = {"int8": 8, "int4": 4, "8da4w": 4, "int2": 2}
"""Of a weight."""

AUTO, MOST_INT2 = 32, 32
"""Inputs that share a scale where nothing else is said, and at most with int2: four levels fit no longer group."""

STEM = "integers"
"""Beginning of the names of the files that hold integers and scales."""


@dataclass(frozen=True)
class Grid:
    """Levels (k - z) s of each group of weights: k, z of bits bits, s fp32.

    At 8 and 4 bits z = 0 and s = max(-min w / 2^(bits-1), max w / (2^(bits-1) - 1)), torchao's
    SYMMETRIC_NO_CLIPPING_ERR; at 2 bits, where that leaves most groups three levels, s = (max w - min w) / 3, its
    ASYMMETRIC. So what lies on the grid has the same k again, and s to its last bit; torchao's SYMMETRIC, amax / 7.5 at
    4 bits, would find other levels for a weight that is rounded. group: inputs that share s and z, None for a row.
    inputs: are rounded too, to 8 bits, asymmetric per token.
    """

    scheme: Scheme
    bits: int
    group: int | None
    inputs: bool

    def linears(self, model: nn.Module, anatomy: Anatomy) -> list[str]:
        """Names of the linears of the blocks that are rounded: those that are torch's own nn.Linear.

        Raises ValueError for a group that does not divide the inputs of one of them, for packed ones, without torchao.
        """
        if importlib.util.find_spec("torchao") is None:
            raise ValueError("method.scheme rounds by the torchao library, which is missing; pip install 'dsft[qat]'")
        for name in anatomy.linears:
            if packed_weights(model.get_submodule(name)):
                raise ValueError(
                    f"quantization must be none where method.scheme rounds, got {name} packed, which would be rounded "
                    "to two grids; take quantization=none"
                )
        names = [name for name in anatomy.linears if self.rounds(model, anatomy, name)]
        if not names:
            raise ValueError(
                f"method.scheme must find an nn.Linear in the blocks, got none in {type(model).__name__}; "
                "take method=full"
            )
        self._check_group({name: model.get_submodule(name).in_features for name in names})  # type: ignore[misc]
        return names

    def rounds(self, model: nn.Module, anatomy: Anatomy, name: str) -> bool:
        """True if the module of this name is rounded: head, embedding, norms and fused experts are not."""
        if name not in anatomy.linears or name in (anatomy.head, anatomy.embedding):
            return False
        module = model.get_submodule(name)
        module = getattr(module, "base_layer", module)  # beside it is an adapter of PEFT's
        return getattr(module, "plain", type(module)) is nn.Linear

    def _check_group(self, sizes: Mapping[str, int]) -> None:
        """sizes: name of a linear -> its inputs."""
        group = self.group
        off = [name for name, size in sizes.items() if group is not None and size % group]
        if group is None or not off:
            return
        most = min(*sizes.values(), MOST_INT2 if self.bits == 2 else max(sizes.values()))
        fitting = [n for n in range(2, most + 1) if all(size % n == 0 for size in sizes.values())]
        nearest = min(fitting, key=lambda n: abs(n - group), default=None)
        way = "take method.scheme=int8" if nearest is None else f"the nearest that does is {nearest}"
        raise ValueError(
            f"method.group_size must divide the inputs of every linear, got {group} and {off[0]} with "
            f"{sizes[off[0]]}; {way}"
        )

    def fake(self, weight: Tensor) -> Tensor:
        """Weight (out, in) fp32 -> its nearest levels, fp32. Gradient: as it is; 0 beyond the outer levels.

        Beyond them there is nothing but, at 2 bits, the largest weight of a group with max w = -min w, a tie.
        """
        low, high = self._ends
        rounded: Tensor = _torchao().fake_quantize(
            weight, self._block(weight), *self._scale(weight), torch.int8, low, high
        )
        return rounded

    def seen(self, x: Tensor) -> Tensor:
        """Inputs (..., in) in any type as the scheme lets a linear see them, in that type; fp32 within."""
        if not self.inputs:
            return x
        ao, wide, block = _torchao(), x.float(), [1] * (x.ndim - 1) + [x.shape[-1]]
        scale, zero = ao.choose_scale(
            wide, ao.mapping.ASYMMETRIC, block, torch.int8, -128, 127, zero_point_dtype=torch.int8
        )
        rounded: Tensor = ao.fake_quantize(wide, block, scale, zero, torch.int8, -128, 127)
        return rounded.to(x.dtype)

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weight (out, in) fp32 -> k (out, in) int8, s (out, in / group) fp32, z (out, in / group) int8."""
        low, high = self._ends
        scale, zero = self._scale(weight)
        numbers: Tensor = _torchao().quantize(weight, self._block(weight), scale, zero, torch.int8, low, high)
        return numbers, scale.reshape(weight.shape[0], -1), zero.reshape(weight.shape[0], -1)

    def weight(self, numbers: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The inverse of integers: (k - z) s, (out, in) fp32."""
        groups = numbers.reshape(*scales.shape, -1).float() - zeros[..., None]
        return (groups * scales[..., None]).reshape(numbers.shape)

    def real(self, linear: nn.Linear, numbers: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Give linear torchao's own quantized weight in place of its own."""
        weight = _torchao().weight(
            qdata=numbers, scale=scales, zero_point=zeros,
            target_dtype=getattr(torch, f"int{self.bits}"), block_size=self._block(numbers), dtype=linear.weight.dtype,
            activation_quantization="int8_asym_per_token" if self.inputs else None,
        )  # fmt: skip
        linear.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def notes(self) -> dict[str, str]:
        """What the files of integers say of themselves."""
        return {
            "scheme": self.scheme,
            "bits": str(self.bits),
            "group_size": str(self.group or "row"),
            "layout": "NAME.packed (out, ceil(in bits / 8)) uint8: k + 2^(bits-1), the first in the lowest bits; "
            "NAME.scales (out, in / group_size) fp32; NAME.zeros the same int8; weight = (k - zero) scale",
        }

    def _scale(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros of the groups; no gradient goes through them."""
        ao, (low, high) = _torchao(), self._ends
        kind = ao.mapping.ASYMMETRIC if self.bits == 2 else ao.mapping.SYMMETRIC_NO_CLIPPING_ERR
        found: tuple[Tensor, Tensor] = ao.choose_scale(
            weight, kind, self._block(weight), torch.int8, low, high, zero_point_dtype=torch.int8
        )
        return found

    def _block(self, weight: Tensor) -> tuple[int, int]:
        return 1, self.group or weight.shape[1]

    @property
    def _ends(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


def grid_of(scheme: Scheme, group_size: int | Literal["auto"]) -> Grid:
    """What method.scheme and method.group_size mean. Raises ValueError for what they cannot be."""
    if scheme not in BITS:
        raise ValueError(f"method.scheme must be one of {', '.join(BITS)}, got {scheme}")
    bits = BITS[scheme]
    if bits == 8:
        if group_size != "auto":
            raise ValueError(
                f"method.group_size must be auto with method.scheme=int8, which has a scale per row, got {group_size}"
            )
        return Grid(scheme, bits, None, inputs=False)
    group = AUTO if group_size == "auto" else group_size
    if group < 2:
        raise ValueError(f"method.group_size must be 2 or more, got {group}; auto is {AUTO}")
    if bits == 2 and group > MOST_INT2:
        raise ValueError(
            f"method.group_size must be at most {MOST_INT2} with method.scheme=int2, whose four levels fit no longer "
            f"group, got {group}; lower it or take method.scheme=int4"
        )
    return Grid(scheme, bits, group, inputs=scheme == "8da4w")


def held(grid: Grid, model: nn.Module, anatomy: Anatomy, name: str, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight of model as its levels, fp32, with packed numbers and scales by name; another parameter as it is."""
    if not (name.endswith(".weight") and grid.rounds(model, anatomy, name.removesuffix(".weight"))):
        return weight, {}
    numbers, scales, zeros = grid.integers(weight.float())
    kept = {f"{name}.packed": pack(numbers, grid.bits), f"{name}.scales": scales, f"{name}.zeros": zeros}
    return grid.weight(numbers, scales, zeros), kept


def load(model: nn.Module, folder: Path | str) -> nn.Module:
    """Make the rounded weights of model torchao's own quantized ones; returns it.

    folder: the result of qat, or of qat_lora merged; model: as transformers loads it from there.
    """
    from safetensors import safe_open

    for path in sorted(Path(folder).glob(f"{STEM}-*.safetensors")):
        with safe_open(path, "pt") as file:
            said = file.metadata()
            grid = grid_of(said["scheme"], int(said["group_size"]) if said["group_size"].isdigit() else "auto")
            for key in (key for key in file.keys() if key.endswith(".packed")):  # no dict
                name = key.removesuffix(".packed")
                linear: Any = model.get_submodule(name.removesuffix(".weight"))
                numbers = unpack(file.get_tensor(key), grid.bits, linear.in_features)
                grid.real(linear, numbers, file.get_tensor(f"{name}.scales"), file.get_tensor(f"{name}.zeros"))
    return model


@dataclass(frozen=True)
class _TorchAO:
    """What is used of it."""

    choose_scale: Any
    quantize: Any
    fake_quantize: Any
    weight: Any
    mapping: Any


@cache
def _torchao() -> _TorchAO:
    """torchao, imported at first use."""
    with uncompiled():
        from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType, choose_qparams_affine, quantize_affine
        from torchao.quantization.quant_primitives import _fake_quantize_affine  # as its own fake quantizers do
    return _TorchAO(
        choose_qparams_affine, quantize_affine, _fake_quantize_affine, IntxUnpackedToInt8Tensor, MappingType
    )
