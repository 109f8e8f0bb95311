"""Soft caps and sinks against a dense matrix of scores in fp64, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsft.models import capped
from dsft.models.attention import cached_attention, ragged_attention
from dsft.models.spans import SPAN, Span
from dsft.protocols import PREFIX

LENGTH, BEFORE, WIDTH, SCALE = 50, 3, 16, 0.3
SPANS = [Span(), Span(window=7), Span(chunk=12)]
EXTRAS: list[dict[str, Any]] = [{"softcap": 2.0}, {"s_aux": torch.tensor([-1.0, 0.0, 1.0, 3.0])}, {}]


class Pairs(nn.Module):
    """A prefix of BEFORE keys and values for 2 groups."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.pairs = torch.randn(2, 1, 2, BEFORE, WIDTH, generator=generator)

    def forward(self, shared: Any) -> tuple[Tensor, Tensor]:
        return self.pairs[0], self.pairs[1]


def attention(span: Span, *, prefix: bool = False) -> nn.Module:
    module = nn.Module()
    setattr(module, SPAN, span)
    if prefix:
        module.add_module(PREFIX, Pairs())
    return module


def projections(groups: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, heads, LENGTH, WIDTH) for heads in (4, groups, groups)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def dense(query: Tensor, key: Tensor, value: Tensor, span: Span, extras: dict[str, Any]) -> Tensor:
    """(1, L, H, D), in the type of query."""
    key, value = (part.repeat_interleave(4 // part.shape[1], 1) for part in (key, value))
    scores = query @ key.mT * SCALE
    if "softcap" in extras:
        scores = extras["softcap"] * torch.tanh(scores / extras["softcap"])
    places = torch.arange(query.shape[2])
    scores = scores.masked_fill(~span.sees(places[:, None], places), float("-inf"))
    if "s_aux" in extras:
        sinks = extras["s_aux"].to(query.dtype)[None, :, None, None]
        scores = torch.cat([scores, sinks.expand(-1, -1, query.shape[2], -1)], 3)
    return (scores.softmax(3)[..., : key.shape[2]] @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("extras", EXTRAS[:2])
def test_outputs_and_gradients_equal_the_dense_ones(
    extras: dict[str, Any], span: Span, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capped, "AT_ONCE_ELSEWHERE", 2**12)  # several blocks of queries
    inputs, exact = projections(groups), projections(groups, torch.float64)
    if "s_aux" in extras:
        inputs.append(extras["s_aux"].clone().requires_grad_())
        exact.append(extras["s_aux"].double().requires_grad_())
    mine, theirs = ({**extras, "s_aux": sinks[3]} if "s_aux" in extras else extras for sinks in (inputs, exact))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got, _ = ragged_attention(attention(span), *inputs[:3], None, segment_lengths=(LENGTH,), scaling=SCALE, **mine)
    expected = dense(*exact[:3], span, theirs)
    weights = torch.linspace(-1, 1, LENGTH * 4 * WIDTH, dtype=torch.float64).view(1, LENGTH, 4, WIDTH)
    grads = torch.autograd.grad((got.double() * weights).sum(), inputs)
    exact_grads = torch.autograd.grad((expected * weights).sum(), exact)
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # sums of 50 terms, each rounded to 8 bits
    for one, other in zip((got, *grads), (expected, *exact_grads), strict=True):
        assert (one.double() - other).abs().max() <= bound * other.abs().max()


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("extras", EXTRAS)
@torch.no_grad()
def test_a_prefix_is_seen_as_tokens_and_generation_sees_the_same(extras: dict[str, Any], span: Span) -> None:
    module = attention(span, prefix=True)
    query, key, value = projections()
    pairs = module.get_submodule(PREFIX)(None)
    padded = query.new_zeros(1, 4, BEFORE, WIDTH)
    whole = [torch.cat([one, other], 2) for one, other in zip((padded, *pairs), (query, key, value), strict=True)]
    expected = dense(*whole, span, extras)[:, BEFORE:]
    got, _ = ragged_attention(module, query, key, value, None, segment_lengths=(LENGTH,), scaling=SCALE, **extras)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    places = torch.arange(LENGTH)
    mask = span.sees(places[:, None], places)[None, None]  # as the model makes it, which knows no prefix
    module.num_key_value_groups = 2  # type: ignore[assignment]
    for first in (0, LENGTH - 1):  # the whole prompt; a token over a cache
        part, seen, positions = query[:, :, first:], mask[:, :, first:], places[None, first:] + BEFORE
        got, _ = cached_attention(module, part, key, value, seen, scaling=SCALE, position_ids=positions, **extras)
        torch.testing.assert_close(got, expected[:, first:], rtol=1e-5, atol=1e-5)
