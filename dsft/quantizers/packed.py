"""A frozen linear kept as bytes: its forward and backward, and how it takes a linear's place."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsft.packed import PACKED, Codec, PackedWeight, packed_weights

ComputeDtype = Literal["auto", "bf16", "fp32"]

COMPUTE_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Values of quantization.compute_dtype; None = the dtype of the input."""


def read_compute_dtype(name: str) -> torch.dtype | None:
    """The dtype that quantization.compute_dtype names, None for auto. Raises ValueError for another name."""
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"quantization.compute_dtype must be auto, bf16 or fp32, got {name}")
    return COMPUTE_DTYPES[name]


class PackedMatrix(PackedWeight):
    """The weight (out, in) of a linear; its module's parameters are called as the codec's parts."""

    def __init__(
        self, codec: Codec, sides: tuple[int, int], dtype: torch.dtype, compute_dtype: torch.dtype | None
    ) -> None:
        self.codec, self.shape, self.sides = codec, sides, sides
        self.dtype, self.compute_dtype = dtype, compute_dtype
        self.shapes, self.at_once = codec.shapes(*sides), 1
        self.parts = tuple(self.shapes)

    def pack(self, matrices: Iterable[Tensor], first: int = 0) -> dict[str, Tensor]:
        """See PackedWeight."""
        (weight,) = matrices
        require(weight, self.sides)
        return self.codec.pack(weight)

    def unpack(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """See PackedWeight."""
        if parts[0].is_meta:
            return torch.empty(self.sides, dtype=dtype, device="meta")
        return self.codec.decode(parts, self.sides, dtype)


class ByteLinear(nn.Linear):
    """A frozen linear whose weight is uint8 parameters, unpacked for one product and never stored.

    Takes over in_features, out_features, bias, device and mode of linear; its own parameters are left empty. In PEFT's
    eyes it is an nn.Linear; its weight is a property.
    compute_dtype: of the unpacked weight and the product, None = the dtype of the input.
    """

    def __init__(self, linear: nn.Linear, codec: Codec, compute_dtype: torch.dtype | None) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the weight that this class avoids
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        sides = (linear.out_features, linear.in_features)
        self.matrix = PackedMatrix(codec, sides, linear.weight.dtype, compute_dtype)
        self.__dict__[PACKED] = {"weight": self.matrix}
        add_bytes(self, self.matrix.shapes, linear.weight.device)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """unpack(): a fresh plain tensor, so writing into it changes nothing."""
        return self.unpack()

    def unpack(self) -> Tensor:
        """Weight (out, in) in the compute dtype, or in the model's where that is auto; empty if the bytes are on meta.

        Raises RuntimeError if the bytes are sharded.
        """
        matrix = self.matrix
        with torch.no_grad():
            return matrix.unpack(whole_parts(self, matrix.shapes), matrix.compute_dtype or matrix.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """F.linear(x, unpacked weight, bias): x (..., in) -> (..., out), in the dtype that F.linear would return."""
        result, compute = dtypes(x, self.matrix.compute_dtype)
        bias = None if self.bias is None else self.bias.to(compute)
        y: Tensor = _Product.apply(x.to(compute), bias, self.matrix, *whole_parts(self, self.matrix.shapes))
        return y.to(result)


def add_bytes(module: nn.Module, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
    """Give module a uint8 parameter of each name and shape."""
    for name, shape in shapes.items():
        data = torch.empty(shape, dtype=torch.uint8, device=device)
        module.register_parameter(name, nn.Parameter(data, requires_grad=False))


def whole_parts(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Return the parameters of module of these names. Raises RuntimeError if one is sharded."""
    parts = tuple(getattr(module, name) for name in shapes)
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        if hasattr(part, "full_tensor") or part.shape != shape:
            raise RuntimeError(f"{name} of a packed weight is sharded; gather its parameters before reading it")
    return parts


def dtypes(x: Tensor, compute_dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtype that a plain product of x would have, and the one to compute in."""
    result = x.dtype
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        result = torch.get_autocast_dtype(x.device.type)
    return result, compute_dtype or result


def require(weight: Tensor, sides: tuple[int, int]) -> None:
    """Raise RuntimeError if weight cannot be packed: another shape, or numbers that are not finite."""
    if weight.shape != sides:
        raise RuntimeError(
            f"weight must be {sides}, got {tuple(weight.shape)}; the model's files do not fit its config.json"
        )
    if not torch.isfinite(weight).all():
        raise RuntimeError("weight must be finite to be packed, got NaN or Inf; the model's files are damaged")


class _Product(torch.autograd.Function):
    """x W^T + b from W's bytes; keeps the parameters themselves, so that backward reads what sharding gathered again.

    W is unpacked once in forward and once in backward and lives no longer than either.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: PackedMatrix, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.weight, ctx.dtype = weight, x.dtype
        with torch.autocast(x.device.type, enabled=False):  # x and bias are cast already; fp32 stays fp32
            return nn.functional.linear(x, weight.unpack(parts, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x = grad_bias = None
        parts = ctx.saved_tensors  # read once: a second read recomputes, or fails, under checkpointing
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ ctx.weight.unpack(parts, ctx.dtype)  # (..., in)
            if ctx.needs_input_grad[1]:
                grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None, *(None for _ in parts)


def floats(raw: Tensor) -> Tensor:
    """Bytes (N, 4) uint8 -> the N float32 they spell: a view, or a copy where gathering left them unaligned."""
    if raw.storage_offset() % 4 or raw.data_ptr() % 4 or not raw.is_contiguous():
        raw = raw.contiguous().clone()
    return raw.view(torch.float32).reshape(-1)


def raw_bytes(values: Tensor) -> Tensor:
    """N numbers, cast to float32 -> their bytes (N, 4) uint8."""
    return values.float().reshape(-1, 1).contiguous().view(torch.uint8)


@torch.no_grad()
def fill(module: nn.Module, name: str, matrices: Iterable[Tensor]) -> None:
    """Pack the weight called name into the module's own parameters, which must be whole and off meta."""
    for part, data in packed_weights(module)[name].pack(matrices).items():
        module.get_parameter(part).copy_(data)
