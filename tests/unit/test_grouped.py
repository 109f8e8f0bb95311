"""The grouped product equals a plain product of each row with its expert's weight, in any type, size and layout."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsft import grouped

BOUNDS = {torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}
SIDES = ((32, 48), (30, 48), (32, 4), (5, 3))
"""In and out: grouped_mm takes the first pair in each type, and no other in bf16."""


def plain(x: Tensor, weight: Tensor, shares: Tensor, index: Tensor) -> Tensor:
    rows = x[:, None].expand(*index.shape, -1)
    return (torch.einsum("tki,tkoi->tko", rows, weight[index]) * shares[..., None]).sum(1)


def by_groups(x: Tensor, weight: Tensor, shares: Tensor, index: Tensor) -> Tensor:
    found = grouped.routes(index, len(weight))
    return grouped.combine(grouped.product(grouped.take(x, found), weight, found.ends), shares, found)


@pytest.mark.parametrize(("dtype", "sides"), list(itertools.product(BOUNDS, SIDES)))
@pytest.mark.parametrize("tokens", [40, 1])
def test_it_equals_a_product_of_each_row(dtype: torch.dtype, sides: tuple[int, int], tokens: int) -> None:
    torch.manual_seed(0)
    index = torch.randint(0, 6, (tokens, 2)).where(torch.tensor(tokens) > 1, 5)
    index[index == 3] = 2  # an expert without a row
    for transposed in (False, True):
        shape = (6, *(sides if transposed else sides[::-1]))
        x, kept, shares = (torch.rand(size, dtype=dtype).requires_grad_() for size in
                           ((tokens, sides[0]), shape, (tokens, 2)))  # fmt: skip
        weight = kept.transpose(1, 2) if transposed else kept
        mine, theirs = (how(x, weight, shares, index) for how in (by_groups, plain))
        grads = [torch.autograd.grad(y.double().square().sum(), (x, kept, shares)) for y in (mine, theirs)]
        for one, other in ((mine.detach(), theirs.detach()), *zip(*grads, strict=True)):
            assert float((one - other).abs().max()) <= BOUNDS[dtype] * float(other.abs().max())


def test_no_rows_give_none() -> None:
    x, weight = torch.randn(0, 32, requires_grad=True), torch.randn(6, 48, 32, requires_grad=True)
    y = by_groups(x, weight, torch.randn(0, 2), torch.zeros(0, 2, dtype=torch.int64))
    assert y.shape == (0, 48)
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_its_gradient_is_its_derivative() -> None:
    found = grouped.routes(torch.randint(0, 4, (7, 2)), 4)
    x, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((7, 5), (4, 3, 5)))
    shares = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)

    def of(x: Tensor, weight: Tensor, shares: Tensor) -> Tensor:
        return grouped.combine(grouped.product(grouped.take(x, found), weight, found.ends), shares, found)

    assert torch.autograd.gradcheck(of, (x, weight, shares))


def test_the_operators_are_known_to_fake_tensors_and_to_autograd() -> None:
    found = grouped.routes(torch.randint(0, 4, (7, 2)), 4)
    x, weight = torch.randn(14, 5, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.dsft.grouped.default, (x, weight, found.ends))
    torch.library.opcheck(torch.ops.dsft.grouped_outer.default, (torch.randn(14, 3), x.detach(), found.ends))


def test_a_frozen_weight_keeps_no_rows() -> None:
    found = grouped.routes(torch.randint(0, 4, (16, 2)), 4)
    x, weight = torch.randn(32, 16, requires_grad=True), torch.randn(4, 8, 16)
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda tensor: tensor):
        grouped.product(x, weight, found.ends)
    assert x.shape not in kept
    assert weight.shape in kept


def test_both_factors_take_the_type_of_autocast() -> None:
    found = grouped.routes(torch.randint(0, 4, (16, 2)), 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped.product(torch.randn(32, 16), torch.randn(4, 8, 16), found.ends).dtype is torch.bfloat16


def test_rows_of_odd_sides_take_the_kernel_where_they_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU pads, as a loop would wait for it: the same numbers."""
    calls: list[tuple[int, ...]] = []

    def seen(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        calls.append(tuple(weight.shape))
        return kernel(x, weight, offs=offs)

    kernel = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", seen)
    torch.manual_seed(0)
    found = grouped.routes(torch.randint(0, 4, (16, 2)), 4)
    x, weight = torch.randn(32, 30, requires_grad=True), torch.randn(4, 7, 30, requires_grad=True)
    alone = grouped.product(x, weight, found.ends)
    assert not calls
    monkeypatch.setattr(grouped, "LOOPS", ())
    padded = grouped.product(x, weight, found.ends)
    assert calls == [(4, 32, 8)]
    torch.testing.assert_close(padded, alone)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (x, weight)) for y in (padded, alone)), strict=True):
        torch.testing.assert_close(one, other)
