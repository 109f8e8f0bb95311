"""The fused forward gives what PEFT's gives, in value and in every gradient, over any base."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dsft.methods.fused_lora import FusedLinear, fuse
from dsft.quantizers.int8 import Int8Codec
from dsft.quantizers.nf4 import NF4Codec
from dsft.quantizers.packed import ByteLinear, fill

BASES: dict[str, Any] = {
    "dense": lambda linear: linear,
    "nf4": lambda linear: ByteLinear(linear, NF4Codec(double_quant=True), None),
    "int8": lambda linear: ByteLinear(linear, Int8Codec(), None),
}


def made(base: str, *, bias: bool, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """The same adapted linear twice: with PEFT's forward and with ours."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias)
    packed = BASES[base](linear)
    if packed is not linear:
        fill(packed, "weight", [linear.weight.detach()])
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["0"])
    plain = inject_adapter_in_model(config, nn.Sequential(packed))
    for name, param in plain.named_parameters():
        param.requires_grad_("lora" in name)
        if "lora_B" in name:
            nn.init.normal_(param)
    ours = copy.deepcopy(plain)
    fuse(ours, "default")
    assert type(ours[0]) is FusedLinear
    return plain, ours


def outcome(model: nn.Module, x: Tensor, precision: torch.dtype) -> list[Tensor]:
    x = x.detach().clone().requires_grad_(x.requires_grad)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        y = model(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    grads = [param.grad for param in model.parameters() if param.requires_grad]
    return [value for value in (y.detach(), x.grad, *grads) if value is not None]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("needs_grad", [False, True], ids=["first block", "later block"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("base", BASES)
def test_it_equals_peft(base: str, bias: bool, needs_grad: bool, precision: torch.dtype) -> None:
    plain, ours = made(base, bias=bias)
    x = torch.randn(1, 7, 64, requires_grad=needs_grad)
    expected, got = outcome(plain, x, precision), outcome(ours, x, precision)
    assert len(expected) == len(got) == 3 + needs_grad
    bound = 1e-6 if precision is torch.float32 else 1e-2
    for one, other in zip(expected, got, strict=True):
        assert one.dtype is other.dtype
        assert (one - other).float().norm() <= bound * one.float().norm()


def test_dropout_falls_on_the_adapter_alone() -> None:
    plain, ours = made("dense", bias=False, dropout=0.5)
    x = torch.randn(1, 7, 64, requires_grad=True)
    for one, other in zip(outcome(plain, x, torch.float32), outcome(ours, x, torch.float32), strict=True):
        torch.testing.assert_close(one, other)


def test_merged_and_disabled_adapters_are_pefts_affair() -> None:
    plain, ours = made("dense", bias=True)
    x = torch.randn(1, 7, 64)
    for model in (plain, ours):
        model[0].merge()
    torch.testing.assert_close(ours(x), plain(x))
    for model in (plain, ours):
        model[0].unmerge()
        model[0].enable_adapters(False)
    torch.testing.assert_close(ours(x), plain(x))


def test_dora_keeps_pefts_forward() -> None:
    config = LoraConfig(r=4, target_modules=["0"], use_dora=True)
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(8, 8)))
    fuse(model, "default")
    assert type(model[0]) is not FusedLinear
