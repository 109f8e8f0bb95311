"""Stacks of fused experts kept as bytes, expert after expert: a few are unpacked at a time for a grouped product."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dsft import grouped
from dsft.packed import PACKED, Codec, PackedStack
from dsft.quantizers.packed import add_bytes, dtypes, require, whole_parts


class Bytes(PackedStack):
    """A stack of E matrices (out, in), each packed by itself.

    Each part is one flat uint8 parameter, called NAME_PART, of E pieces of one size, so that any number of ranks
    shares it evenly. A class that keeps its stack as (E, in, out) has its matrices turned before they are packed.
    """

    def __init__(
        self, codec: Codec, name: str, stack: Tensor, *, turned: bool, compute_dtype: torch.dtype | None,
        unpack_bytes: int,
    ) -> None:  # fmt: skip
        """unpack_bytes: of unpacked experts at a time; one at least is."""
        self.codec, self.dtype, self.compute_dtype, self.turned = codec, stack.dtype, compute_dtype, turned
        self.experts, one, other = self.shape = tuple(stack.shape)
        self.sides = (other, one) if turned else (one, other)
        self.pieces = codec.shapes(*self.sides)
        sizes = {part: torch.Size(shape).numel() for part, shape in self.pieces.items()}
        self.shapes: dict[str, tuple[int, ...]] = {f"{name}_{part}": (self.experts * n,) for part, n in sizes.items()}
        self.parts = tuple(self.shapes)
        size = one * other * (compute_dtype or stack.dtype).itemsize
        self.at_once = max(1, min(self.experts, unpack_bytes // size))

    def pack(self, matrices: Iterable[Tensor], first: int = 0) -> dict[str, Tensor]:
        """See PackedWeight; one matrix is read, packed and forgotten after the other."""
        whole: dict[str, Tensor] = {}
        for expert, matrix in enumerate(matrices, first):
            weight = matrix.T if self.turned else matrix
            require(weight, self.sides)
            for name, piece in zip(self.parts, self.codec.pack(weight).values(), strict=True):
                if name not in whole:
                    whole[name] = piece.new_zeros(self.experts, piece.numel())
                whole[name][expert] = piece.flatten()
        if not whole:  # a rank that keeps no byte of it
            return {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in self.shapes.items()}
        return {name: part.flatten() for name, part in whole.items()}

    def unpack(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See PackedWeight."""
        stack = self.some(parts, 0, self.experts, dtype)
        return stack.transpose(1, 2).contiguous() if self.turned else stack

    def some(self, parts: Sequence[Tensor], first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Experts first to last - 1 -> (last - first, out, in)."""
        if parts[0].is_meta:
            return torch.empty(last - first, *self.sides, dtype=dtype, device="meta")
        cut = [part.view(self.experts, *shape) for part, shape in zip(parts, self.pieces.values(), strict=True)]

        def one(expert: int) -> Tensor:
            return self.codec.decode([part[expert] for part in cut], self.sides, dtype)

        if last - first == 1:
            return one(first).unsqueeze(0)
        found = torch.empty(last - first, *self.sides, dtype=dtype, device=parts[0].device)
        for expert in range(first, last):
            found[expert - first] = one(expert)
        return found

    def product(self, module: nn.Module, x: Tensor, ends: Tensor) -> Tensor:
        """See PackedStack."""
        result, compute = dtypes(x, self.compute_dtype)
        y: Tensor = _Product.apply(x.to(compute), ends, self, *whole_parts(module, self.shapes))
        return y.to(result)


class _Product(torch.autograd.Function):
    """grouped.product from a stack's bytes, a few experts at a time; only the bytes are kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, stack: Bytes, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(ends, *parts)
        ctx.stack, ctx.chunks = stack, _chunks(stack, ends)
        return _by_chunks(x, ends, stack, parts, ctx.chunks, turned=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ends, *parts = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _by_chunks(grad.contiguous(), ends, ctx.stack, parts, ctx.chunks, turned=True)
        return grad_x, None, None, *(None for _ in parts)


def _chunks(stack: Bytes, ends: Tensor) -> list[tuple[int, int, slice]] | None:
    """First and last + 1 of the experts of each chunk, and its rows; chunks without rows are left out.

    None: all experts are unpacked at once. Else the host waits for a GPU, to know where rows end.
    """
    if stack.at_once >= stack.experts:
        return None
    borders = [*range(0, stack.experts, stack.at_once), stack.experts]
    rows = [0, *ends.tolist()]
    return [(a, b, slice(rows[a], rows[b])) for a, b in pairwise(borders) if rows[b] > rows[a]]


def _by_chunks(
    x: Tensor, ends: Tensor, stack: Bytes, parts: Sequence[Tensor], chunks: list[tuple[int, int, slice]] | None, *,
    turned: bool,
) -> Tensor:  # fmt: skip
    """Rows x (S, in) -> (S, out); turned: rows (S, out) -> (S, in), by the same weights."""

    def product(rows: Tensor, first: int, last: int, until: Tensor) -> Tensor:
        weight = stack.some(parts, first, last, x.dtype)
        return grouped.product(rows, weight.transpose(1, 2) if turned else weight, until)

    with torch.autocast(x.device.type, enabled=False):  # x is cast already; fp32 stays fp32
        if chunks is None:
            return product(x, 0, stack.experts, ends)
        y = x.new_empty(len(x), stack.sides[1 if turned else 0])
        for first, last, rows in chunks:
            y[rows] = product(x[rows], first, last, ends[first:last] - rows.start)
    return y


def pack_stacks(
    module: nn.Module, codec: Codec, *, compute_dtype: torch.dtype | None, unpack_bytes: int
) -> dict[str, PackedStack]:
    """Keep every stack of matrices of a module of experts as bytes. Those that have values are packed at once."""
    turned = bool(module.is_transposed)
    stacks = {name: param for name, param in module.named_parameters(recurse=False) if param.ndim == 3}
    packed: dict[str, PackedStack] = {}
    for name, stack in stacks.items():
        one = Bytes(codec, name, stack, turned=turned, compute_dtype=compute_dtype, unpack_bytes=unpack_bytes)
        del module._parameters[name]
        add_bytes(module, one.shapes, stack.device)
        packed[name] = one
        if not stack.is_meta:
            for part, data in one.pack(stack.detach()).items():
                module.get_parameter(part).data.copy_(data)
    module.__dict__[PACKED] = packed
    return packed
