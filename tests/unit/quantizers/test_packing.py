"""What is stored: levels, error, size, and that the bytes are bitsandbytes' own."""

import pytest
import torch
from torch import Tensor, nn

from dsft.quantizers.int8 import Int8, Int8Codec
from dsft.quantizers.nf4 import NF4, NF4Codec
from dsft.quantizers.packed import ByteLinear, fill, floats, raw_bytes

# QLoRA, appendix E
NF4_LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def nf4(weight: Tensor, *, double_quant: bool = True, compute_dtype: torch.dtype | None = None) -> ByteLinear:
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    packed = ByteLinear(dense, NF4Codec(double_quant=double_quant), compute_dtype)
    fill(packed, "weight", [weight])
    return packed


def int8(weight: Tensor) -> ByteLinear:
    packed = ByteLinear(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype), Int8Codec(), None)
    fill(packed, "weight", [weight])
    return packed


def stored_bits(linear: ByteLinear) -> float:
    assert {param.dtype for param in linear.parameters()} == {torch.uint8}
    return 8 * sum(p.numel() for p in linear.parameters()) / (linear.in_features * linear.out_features)


def test_nf4_has_the_sixteen_levels_of_the_paper() -> None:
    weight = torch.randn(512, 64)  # one block a row
    unpacked = nf4(weight, double_quant=False).weight
    levels = torch.unique(unpacked / weight.abs().amax(dim=1, keepdim=True))
    table = torch.tensor(NF4_LEVELS)
    nearest = (levels.unsqueeze(1) - table).abs()
    assert nearest.amin(dim=1).max() < 1e-6  # one multiply and one divide in fp32
    assert torch.equal(nearest.argmin(dim=1).unique(), torch.arange(16))


def test_nf4_keeps_zero_and_the_largest_of_each_block() -> None:
    weight = torch.randn(64, 64)
    weight[:, 3] = 0.0
    unpacked = nf4(weight, double_quant=False).weight
    assert (unpacked[:, 3] == 0).all()
    top = weight.abs().argmax(dim=1, keepdim=True)
    assert torch.equal(unpacked.gather(1, top), weight.gather(1, top))


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_error_on_normal_weights_is_the_known_one(double_quant: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)
    error = nf4(weight, double_quant=double_quant).weight - weight
    assert error.pow(2).mean().sqrt().item() == pytest.approx(0.0920, abs=3e-4)
    assert error.abs().mean().item() == pytest.approx(0.0728, abs=3e-4)


def test_packing_an_unpacked_weight_changes_nothing() -> None:
    torch.manual_seed(0)
    once = nf4(torch.randn(128, 256), double_quant=False)
    again = once.matrix.pack([once.weight])
    assert set(again) == set(once.matrix.parts)
    assert all(torch.equal(part, once.get_parameter(name)) for name, part in again.items())
    eight = int8(torch.randn(128, 256))
    assert torch.equal(eight.matrix.pack([eight.weight])["payload"], eight.get_parameter("payload"))


def test_storage_is_4_127_bits_with_double_quantization_and_4_5_without() -> None:
    weight = torch.zeros(1024, 1024)
    # 4 + 8/64 + 32/(64*256), and one fp32 mean per weight
    assert stored_bits(nf4(weight)) == pytest.approx(4.126953125 + 32 / 2**20, abs=1e-9)
    assert stored_bits(nf4(weight, double_quant=False)) == 4.5
    assert stored_bits(int8(weight)) == 8 + 32 / 1024


@pytest.mark.parametrize("shape", [(128, 256), (8, 100), (5, 33), (3, 7), (64, 48), (1, 1), (1, 2)])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_bitsandbytes_bit_for_bit(shape: tuple[int, int], double_quant: bool, dtype: torch.dtype) -> None:
    import bitsandbytes.functional as bnb

    weight = torch.randn(shape).to(dtype)
    payload, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    ours = nf4(weight, double_quant=double_quant)
    assert torch.equal(ours.get_parameter("payload"), payload.flatten())
    expected = bnb.dequantize_4bit(payload, state).reshape(shape)
    assert ours.weight.dtype == dtype
    assert torch.equal(ours.weight, expected)


def test_nf4_forward_equals_linear4bit() -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    weight, x = torch.randn(96, 128), torch.randn(2, 5, 128, requires_grad=True)
    theirs = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    theirs.to("cpu")
    theirs.weight = theirs.weight._quantize("cpu") if not theirs.weight.bnb_quantized else theirs.weight
    assert torch.equal(nf4(weight)(x), theirs(x))


def test_int8_error_is_within_half_a_step_of_each_row() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 512) * torch.logspace(-3, 3, 256).unsqueeze(1)
    weight[7] = 0.0
    unpacked = int8(weight).weight
    bound = weight.abs().amax(dim=1, keepdim=True) / 254
    assert ((unpacked - weight).abs() <= bound * (1 + 1e-5)).all()  # rounding of the fp32 product
    assert (unpacked[7] == 0).all()


def test_int8_relative_error_of_normal_weights_is_below_one_percent() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 64)
    error = (int8(weight).weight - weight).norm() / weight.norm()
    assert 0.003 < error < 0.01


def test_int8_stores_rows_of_denormal_numbers_without_nan() -> None:
    weight = torch.full((2, 4), 1e-42)
    weight[0, 0] = 0.0
    assert int8(weight).weight.isfinite().all()


@pytest.mark.parametrize("make", [nf4, int8])
def test_casting_the_module_leaves_every_byte(make) -> None:
    linear = make(torch.randn(64, 96))
    before = {name: param.clone() for name, param in linear.named_parameters()}
    linear.bfloat16().half().to(torch.float64)
    assert all(torch.equal(param, before[name]) for name, param in linear.named_parameters())
    assert not any(param.requires_grad for param in linear.parameters())


@pytest.mark.parametrize("make", [nf4, int8])
def test_a_weight_that_cannot_be_packed_is_refused(make) -> None:
    linear = make(torch.randn(64, 96))
    with pytest.raises(RuntimeError, match="NaN or Inf"):
        linear.matrix.pack([torch.full((64, 96), float("nan"))])
    with pytest.raises(RuntimeError, match=r"weight must be \(64, 96\)"):
        linear.matrix.pack([torch.randn(96, 64)])


def test_an_unknown_compute_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantization.compute_dtype must be auto, bf16 or fp32, got fp8"):
        NF4(double_quant=True, compute_dtype="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"quantization.compute_dtype"):
        Int8(compute_dtype="fp8")  # type: ignore[arg-type]


def test_floats_reads_bytes_at_any_alignment() -> None:
    values = torch.randn(5)
    raw = raw_bytes(values)
    assert raw.shape == (5, 4)
    assert torch.equal(floats(raw), values)
    flat = torch.empty(21, dtype=torch.uint8)
    flat[1:] = raw.flatten()
    assert torch.equal(floats(flat[1:].view(5, 4)), values)
