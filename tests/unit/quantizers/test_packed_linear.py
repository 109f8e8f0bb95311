"""How a packed linear computes: as F.linear on the unpacked weight, in every mode that training uses."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dsft.quantizers.int8 import Int8Codec
from dsft.quantizers.nf4 import NF4Codec
from dsft.quantizers.packed import ByteLinear, fill

KINDS = ["nf4", "int8"]


def build(
    kind: str, *, bias: bool = True, dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None
) -> ByteLinear:
    torch.manual_seed(0)
    dense = nn.Linear(96, 80, bias=bias, dtype=dtype)
    packed: ByteLinear
    if kind == "nf4":
        packed = ByteLinear(dense, NF4Codec(double_quant=True), compute)
    else:
        packed = ByteLinear(dense, Int8Codec(), compute)
    fill(packed, "weight", [dense.weight.detach()])
    return packed


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_equal_linear(kind: str, bias: bool, dtype: torch.dtype) -> None:
    linear = build(kind, bias=bias, dtype=dtype)
    x, same = inputs(dtype), inputs(dtype)
    y, expected = linear(x), functional.linear(same, linear.unpack(), linear.bias)
    assert torch.equal(y, expected)
    y.pow(2).sum().backward()
    grads = [linear.bias.grad.clone()] if bias else []
    if bias:
        linear.bias.grad = None
    expected.pow(2).sum().backward()
    assert torch.equal(x.grad, same.grad)
    if bias:
        # two orders of summation; bf16 keeps 8 bits
        torch.testing.assert_close(grads[0], linear.bias.grad, rtol=1e-5 if dtype is torch.float32 else 2e-2, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_the_true_one(kind: str) -> None:
    linear = build(kind, dtype=torch.float64)
    x = torch.randn(2, 96, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_casts_as_it_does_for_linear(kind: str) -> None:
    linear = build(kind)
    x, same = inputs(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = linear(x), functional.linear(same, linear.unpack(), linear.bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    expected.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert torch.equal(x.grad, same.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_compute_dtype_decides_the_product_not_the_result(kind: str) -> None:
    exact, x = build(kind, compute=torch.float32), inputs(torch.bfloat16)
    assert exact.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = exact(x)
    wide = functional.linear(x.float(), exact.unpack(), exact.bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, wide.bfloat16())
    short = build(kind, compute=torch.bfloat16)
    assert short.weight.dtype == torch.bfloat16
    assert short(inputs()).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same_gradient(kind: str, reentrant: bool) -> None:
    first, second = build(kind), nn.Linear(80, 96)
    plain, recomputed = inputs(), inputs()

    def block(x: Tensor) -> Tensor:
        return second(torch.tanh(first(x)))

    block(plain).pow(2).sum().backward()
    expected = second.weight.grad.clone()
    second.weight.grad = None
    checkpoint(block, recomputed, use_reentrant=reentrant).pow(2).sum().backward()
    assert torch.equal(recomputed.grad, plain.grad)
    assert torch.equal(second.weight.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_keeps_bytes_and_no_weight(kind: str) -> None:
    linear = build(kind)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(inputs())
    assert {tensor.dtype for tensor in saved} == {torch.uint8}
    # the storage itself, not a copy: a strategy that frees and gathers it again must be seen by backward
    own = {linear.get_parameter(name).data_ptr() for name in linear.matrix.parts}
    assert {tensor.data_ptr() for tensor in saved} == own


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_a_fresh_tensor_and_no_parameter(kind: str) -> None:
    linear = build(kind)
    assert isinstance(linear, nn.Linear)
    assert "weight" not in dict(linear.named_parameters())
    assert not isinstance(linear.weight, nn.Parameter)
    assert not linear.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_not_whole_are_refused(kind: str) -> None:
    linear = build(kind)
    linear.payload.data = linear.payload.data[:3]
    with pytest.raises(RuntimeError, match="payload of a packed weight is sharded"):
        linear.unpack()
