"""Rounding to a grid is torchao's, its gradient is straight through, its integers are those of a real conversion."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerGroup,
    quantize_,
)

from dsft.methods.bits import pack, unpack
from dsft.methods.branches import grow
from dsft.methods.grid import BITS, Grid, grid_of
from dsft.methods.rounded import Rounded, in_type, product

SCHEMES = tuple(BITS)
ULP = 2**-23


def theirs(scheme: str, group: int = 32) -> Any:
    """torchao's own configuration of a real conversion."""
    if scheme == "int8":
        return IntxWeightOnlyConfig(torch.int8, PerAxis(0), MappingType.SYMMETRIC_NO_CLIPPING_ERR)
    if scheme == "8da4w":
        return Int8DynamicActivationIntxWeightConfig(
            torch.int4, PerGroup(group), MappingType.SYMMETRIC_NO_CLIPPING_ERR, act_mapping_type=MappingType.ASYMMETRIC
        )
    mapping = {"int4": MappingType.SYMMETRIC_NO_CLIPPING_ERR, "int2": MappingType.ASYMMETRIC}[scheme]
    return IntxWeightOnlyConfig(getattr(torch, scheme), PerGroup(group), mapping)


def weights(*, seed: int = 0) -> Tensor:
    """(48, 96): normal, but for a group of zeros, of one sign, of a single large weight, and one with max = -min."""
    value = torch.randn(48, 96, generator=torch.Generator().manual_seed(seed)) * 0.02
    value[0, :32] = 0
    value[1, :32] = value[1, :32].abs()
    value[2, 5] = -3.0
    value[3, :32] = value[3, :32].clamp(-0.01, 0.01)
    return value


def rounded_linear(grid: Grid, *, bias: bool = True) -> Any:
    layer: Any = nn.Linear(96, 48, bias=bias)
    layer.weight.data = weights()
    grow(layer, Rounded)
    layer.grid = grid
    return layer


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_rounding_linear_gives_what_torchaos_converted_one_gives_to_the_bit(scheme: Any) -> None:
    grid = grid_of(scheme, "auto")
    mine = rounded_linear(grid)
    real = nn.Sequential(nn.Linear(96, 48))
    real.load_state_dict({f"0.{name}": value for name, value in mine.state_dict().items()})
    quantize_(real, theirs(scheme))
    x = torch.randn(3, 7, 96)
    assert torch.equal(mine(x), real(x))
    numbers, scales, zeros = grid.integers(mine.weight.detach())
    weight: Any = real[0].weight
    assert torch.equal(numbers, weight.qdata)
    assert torch.equal(scales, weight.scale)
    assert torch.equal(zeros, weight.zero_point)
    assert torch.equal(grid.weight(numbers, scales, zeros), weight.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_group_has_no_more_values_than_its_bits_tell_apart(scheme: Any) -> None:
    grid = grid_of(scheme, "auto")
    groups = grid.fake(weights()).reshape(-1, grid.group or 96)
    assert max(len(group.unique()) for group in groups) <= 2**grid.bits
    assert float((grid.fake(weights()) - weights()).abs().max()) > 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(5))
def test_what_is_rounded_already_stays(scheme: Any, seed: int) -> None:
    grid = grid_of(scheme, "auto")
    once = grid.fake(weights(seed=seed))
    twice = grid.fake(once)
    (numbers, scales, zeros), again = grid.integers(weights(seed=seed)), grid.integers(once)
    assert torch.equal(numbers, again[0])
    assert torch.equal(zeros, again[2])
    # s is found by a division and a product is compared with it: its last bit may go either way
    assert float(((again[1] - scales) / scales).abs().max()) <= ULP
    assert float((twice - once).abs().max()) <= ULP * float(once.abs().max())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_goes_straight_through_and_stops_beyond_the_outer_levels(scheme: Any) -> None:
    grid = grid_of(scheme, "auto")
    weight = weights().requires_grad_()
    above = torch.randn(48, 96)
    grid.fake(weight).backward(above)
    _, scales, zeros = grid.integers(weight.detach())
    numbers = (weight.detach().reshape(*scales.shape, -1) * (1 / scales[..., None])).round() + zeros[..., None]
    inside = ((numbers >= -(2 ** (grid.bits - 1))) & (numbers < 2 ** (grid.bits - 1))).reshape(48, 96)
    assert weight.grad is not None
    tiny = scales.repeat_interleave(96 // scales.shape[1], 1) < 1e-30
    # it is multiplied by s and by 1 / s, which of a group of zeros is too small to keep all digits
    assert torch.allclose(weight.grad[inside & ~tiny], above[inside & ~tiny], rtol=4 * ULP, atol=0)
    assert torch.allclose(weight.grad[inside], above[inside], rtol=1e-3, atol=1e-5)
    assert not weight.grad[~inside].any()
    assert bool((~inside).any()) == (scheme == "int2"), "of the group that ends at equal distances"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_backward_that_rounds_anew_is_autograds_own(scheme: Any, bias: bool) -> None:
    grid = grid_of(scheme, "auto")
    layer = rounded_linear(grid, bias=bias)
    x, above = torch.randn(2, 5, 96), torch.randn(2, 5, 48)
    found = []
    for kept in (False, True):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        y = linear(grid.seen(inputs), grid.fake(layer.weight), layer.bias) if kept else layer(inputs)
        y.backward(above)
        found.append([y.detach(), inputs.grad, *(param.grad.clone() for param in layer.parameters())])
    for mine, autograds in zip(*found, strict=True):
        assert torch.allclose(mine, autograds, rtol=1e-5, atol=1e-6)  # sums in another order


def test_nothing_of_the_weights_size_is_kept_for_backward() -> None:
    layer = rounded_linear(grid_of("8da4w", "auto"))
    x = torch.randn(2, 5, 96, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    own = {layer.weight.data_ptr(), x.data_ptr()}
    assert kept
    assert not [tensor for tensor in kept if tensor.data_ptr() not in own]


def test_a_weight_in_bf16_has_the_scales_and_the_output_of_its_fp32_master_under_autocast() -> None:
    grid, x = grid_of("int4", "auto"), torch.randn(5, 96)
    master = weights()
    with torch.autocast("cpu", torch.bfloat16):
        whole = product(x, None, grid, in_type, master)
    sharded = product(x.bfloat16(), None, grid, in_type, master.bfloat16())
    assert whole.dtype is sharded.dtype is torch.bfloat16
    assert torch.equal(whole, sharded)
    scales = grid.integers(in_type(torch.bfloat16, master))[1]
    assert scales.dtype is torch.float32
    assert not torch.equal(scales, scales.bfloat16().float())


def test_what_learns_is_frozen_where_it_needs_no_gradient() -> None:
    layer = rounded_linear(grid_of("int4", "auto"))
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 96, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [8, 9, 11])
def test_numbers_come_back_from_their_bytes(bits: int, columns: int) -> None:
    low = -(2 ** (bits - 1))
    numbers = torch.randint(low, -low, (5, columns), dtype=torch.int8)
    packed = pack(numbers, bits)
    assert packed.shape == (5, -(-columns * bits // 8))
    assert torch.equal(unpack(packed, bits, columns), numbers)


def test_the_first_number_is_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([[-8, 7, 0]], dtype=torch.int8), 4).tolist() == [[0xF0, 0x08]]


CODE = """
import dsft, logging
import torchao
from transformers import AutoModelForCausalLM
logging.getLogger("torchao").warning("something else")
"""


def test_importing_torchao_is_quiet_and_what_else_it_says_is_said() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stderr == "something else\n"
