"""A frozen linear kept as bytes: its forward and backward, how it takes a linear's place, what is left unpacked."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsft.protocols import Anatomy, PackedLinear

ComputeDtype = Literal["auto", "bf16", "fp32"]

COMPUTE_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Values of quantization.compute_dtype; None = the dtype of the input."""


def read_compute_dtype(name: str) -> torch.dtype | None:
    """The dtype that quantization.compute_dtype names, None for auto. Raises ValueError for another name."""
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"quantization.compute_dtype must be auto, bf16 or fp32, got {name}")
    return COMPUTE_DTYPES[name]


class ByteLinear(PackedLinear):
    """What NF4Linear and Int8Linear share: uint8 parameters, unpacked for one product and never stored.

    Takes over in_features, out_features, bias, device and mode of linear; its own parameters are left empty.
    compute_dtype: of the unpacked weight and the product, None = the dtype of the input.
    """

    def __init__(
        self, linear: nn.Linear, compute_dtype: torch.dtype | None, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate the weight that this class avoids
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.model_dtype, self.compute_dtype = linear.weight.dtype, compute_dtype
        self.register_parameter("bias", linear.bias)
        for name, shape in shapes.items():
            data = torch.empty(shape, dtype=torch.uint8, device=linear.weight.device)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))
        self.shapes = shapes
        self.packed = tuple(shapes)
        self.train(linear.training)

    @abstractmethod
    def decode(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Weight (out, in) in dtype, from the bytes in the order of packed, on their device (not meta)."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """unpack(): a fresh plain tensor, so writing into it changes nothing."""
        return self.unpack()

    def unpack(self) -> Tensor:
        """Weight (out, in) in the compute dtype, or in the model's where that is auto; empty if the bytes are on meta.

        Raises RuntimeError if the bytes are sharded.
        """
        dtype = self.compute_dtype or self.model_dtype
        with torch.no_grad():
            return _decode(self, self._parts(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """F.linear(x, unpacked weight, bias): x (..., in) -> (..., out), in the dtype that F.linear would return."""
        result = x.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
            result = torch.get_autocast_dtype(x.device.type)
        compute = self.compute_dtype or result
        bias = None if self.bias is None else self.bias.to(compute)
        y: Tensor = _Product.apply(x.to(compute), bias, self, *self._parts())
        return y.to(result)

    def check(self, weight: Tensor) -> None:
        """Raise RuntimeError if weight cannot be packed: another shape, or numbers that are not finite."""
        if weight.shape != (self.out_features, self.in_features):
            raise RuntimeError(
                f"weight must be ({self.out_features}, {self.in_features}), got {tuple(weight.shape)}; "
                "the model's files do not fit its config.json"
            )
        if not torch.isfinite(weight).all():
            raise RuntimeError("weight must be finite to be packed, got NaN or Inf; the model's files are damaged")

    def _parts(self) -> tuple[Tensor, ...]:
        parts = tuple(getattr(self, name) for name in self.packed)
        for name, part in zip(self.packed, parts, strict=True):
            if hasattr(part, "full_tensor") or part.shape != self.shapes[name]:
                raise RuntimeError(f"{name} of a packed linear is sharded; gather its parameters before reading it")
        return parts


def _decode(linear: ByteLinear, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    if parts[0].is_meta:
        return torch.empty(linear.out_features, linear.in_features, dtype=dtype, device="meta")
    return linear.decode(parts, dtype)


class _Product(torch.autograd.Function):
    """x W^T + b from W's bytes; keeps the parameters themselves, so that backward reads what sharding gathered again.

    W is unpacked once in forward and once in backward and lives no longer than either.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, linear: ByteLinear, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.linear, ctx.dtype = linear, x.dtype
        with torch.autocast(x.device.type, enabled=False):  # x and bias are cast already; fp32 stays fp32
            return nn.functional.linear(x, _decode(linear, parts, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_x = grad_bias = None
        parts = ctx.saved_tensors  # read once: a second read recomputes, or fails, under checkpointing
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ _decode(ctx.linear, parts, ctx.dtype)  # (..., in)
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


def swap_linears(model: nn.Module, anatomy: Anatomy, name: str, make: Callable[[nn.Linear], ByteLinear]) -> nn.Module:
    """Put make(linear) in place of every nn.Linear of anatomy.linears; return the model.

    A linear off meta is packed at once. Head, embedding and fused experts stay; so do subclasses of nn.Linear, whose
    forward may differ (footprint counts all that stays). name: the quantization's, for the message.
    Raises ValueError if nothing was packed.
    """
    swapped = 0
    for path in anatomy.linears:
        linear = model.get_submodule(path)
        if type(linear) is not nn.Linear or path in (anatomy.head, anatomy.embedding):
            continue
        packed = make(linear)
        if not linear.weight.is_meta:
            fill(packed, linear.weight.detach())
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)
        swapped += 1
    if swapped == 0:
        raise ValueError(
            f"quantization={name} must find an nn.Linear in the blocks, got none in {type(model).__name__}; "
            "choose quantization=none"
        )
    return model


@torch.no_grad()
def fill(linear: PackedLinear, weight: Tensor) -> None:
    """Pack weight (out, in) into the linear's own parameters, which must be whole and off meta."""
    for name, data in linear.pack(weight).items():
        linear.get_parameter(name).copy_(data)


@dataclass(frozen=True)
class Footprint:
    """How a model's memory divides: parameters as the model counts them, bytes as they are stored.

    packed: inside PackedLinear, without biases; plain: all others; experts: those of plain that are fused (E, ., .).
    """

    packed_parameters: int
    packed_bytes: int
    plain_parameters: int
    plain_bytes: int
    expert_parameters: int

    def __str__(self) -> str:
        """One line for the terminal."""
        total = max(1, self.packed_parameters + self.plain_parameters)
        size = self.packed_bytes + self.plain_bytes
        shown = f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
        line = (
            f"{self.packed_parameters / total:.1%} of {total:,} parameters packed, "
            f"{self.plain_parameters / total:.1%} left as they are: {shown}, "
            f"{self.plain_bytes / max(1, size):.1%} of it not packed"
        )
        if self.expert_parameters and self.packed_parameters:
            line += f"; fused experts stay unpacked ({self.expert_parameters / total:.1%} of the parameters)"
        return line


def footprint(model: nn.Module) -> Footprint:
    """What is packed in model and what is not, on meta too; exact before sharding. Tied parameters count once."""
    packed_parameters = packed_bytes = 0
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            parts = [module.get_parameter(name) for name in module.packed]
            packed_parameters += module.in_features * module.out_features
            packed_bytes += sum(part.numel() for part in parts)
            inside.update(id(part) for part in parts)
    plain = [param for param in model.parameters() if id(param) not in inside]
    return Footprint(
        packed_parameters=packed_parameters,
        packed_bytes=packed_bytes,
        plain_parameters=sum(param.numel() for param in plain),
        plain_bytes=sum(param.numel() * param.element_size() for param in plain),
        expert_parameters=sum(param.numel() for param in plain if param.ndim == 3),
    )
