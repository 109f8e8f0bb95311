from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dsft_launchers.verdict import RefusedError
from torch import Tensor, nn

from dsft.models.attention import groups_apart, ragged_attention, takes_groups
from dsft.models.spans import UnheldError

FAMILIES = ["llama", "qwen3", "mixtral", "gpt2"]
LENGTHS = (5, 37, 1, 64, 20)
ROUNDING = 1e-5
"""A product with a handful of rows runs another BLAS kernel, which rounds differently: short examples, and experts,
whose number of rows depends on the neighbours. Values are of order 1."""


def examples(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator) for length in LENGTHS]


def hidden(model: Any, rows: list[Tensor]) -> Tensor:
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    lengths = tuple(len(row) for row in rows)
    output = model.get_decoder()(input_ids=torch.cat(rows)[None], position_ids=positions, segment_lengths=lengths)
    return output.last_hidden_state[0]


def projections(length: int = sum(LENGTHS)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, length, 16, generator=generator)
    key, value = torch.randn(2, 1, 2, length, 16, generator=generator)
    return query, key, value


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_example_never_feels_its_neighbours(family: str, shape: Callable, load: Callable) -> None:
    model = load(shape(family)).eval()
    rows = examples()
    others = [row if index == 3 else (row + 1) % 256 for index, row in enumerate(rows)]
    start = sum(LENGTHS[:3])
    before, after = hidden(model, rows), hidden(model, others)
    mine = slice(start, start + LENGTHS[3])
    torch.testing.assert_close(before[mine], after[mine], rtol=0, atol=ROUNDING if family == "mixtral" else 0)
    assert not torch.equal(before[:start], after[:start])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_equals_separate(family: str, shape: Callable, load: Callable) -> None:
    model = load(shape(family)).eval()
    packed = hidden(model, examples()).split(LENGTHS)
    separate = [hidden(model, [row]) for row in examples()]
    for one, other in zip(packed, separate, strict=True):
        exact = len(one) >= 20 and family != "mixtral"
        torch.testing.assert_close(one, other, rtol=0, atol=0 if exact else ROUNDING)


def test_packed_attention_equals_separate_bit_for_bit() -> None:
    query, key, value = projections()
    packed, _ = ragged_attention(nn.Identity(), query, key, value, None, segment_lengths=LENGTHS)
    parts = zip(query.split(LENGTHS, 2), key.split(LENGTHS, 2), value.split(LENGTHS, 2), strict=True)
    separate = [ragged_attention(nn.Identity(), *part, None, segment_lengths=(part[0].shape[2],))[0] for part in parts]
    assert torch.equal(packed, torch.cat(separate, 1))


@pytest.mark.parametrize("window", [1, 7, 16, 100])
def test_sliding_window_equals_the_dense_mask(window: int) -> None:
    query, key, value = projections(50)
    ours, _ = ragged_attention(nn.Identity(), query, key, value, None, segment_lengths=(50,), sliding_window=window)
    row, column = torch.arange(50)[:, None], torch.arange(50)[None, :]
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 16**0.5
    scores = scores.masked_fill((column > row) | (column <= row - window), float("-inf"))
    dense = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(ours, dense.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 16])
def test_no_call_has_a_mask_and_groups_and_no_number_moves(
    window: int | None, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both at once CUDA has the math kernel only, which keeps all scores."""
    calls: list[dict[str, Any]] = []
    real = F.scaled_dot_product_attention

    def recorded(*args: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return real(*args, **options)

    query, key, value = (part.requires_grad_() for part in projections(50))
    heads = [part[:, : min(groups, part.shape[1])] for part in (key, value)]
    if groups == 4:
        heads = [part.repeat_interleave(2, 1) for part in (key, value)]
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    options: Any = {"segment_lengths": (13, 37), "sliding_window": window}
    ours, _ = ragged_attention(nn.Identity(), query, *heads, None, **options)
    got = torch.autograd.grad(ours.square().sum(), (query, key, value))
    assert [call for call in calls if call.get("attn_mask") is not None and call.get("enable_gqa")] == []
    assert any(call.get("attn_mask") is not None for call in calls) is (window is not None)

    spread = [part.repeat_interleave(4 // part.shape[1], 1) for part in heads]
    alone, _ = ragged_attention(nn.Identity(), query, *spread, None, **options)
    torch.testing.assert_close(ours, alone, rtol=0, atol=1e-6)
    for mine, other in zip(got, torch.autograd.grad(alone.square().sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)  # sums of 50 terms of order 1


@pytest.mark.parametrize(
    ("device", "dtype", "width", "taken"),
    [
        ("cpu", torch.float32, 512, True),
        ("cuda", torch.bfloat16, 256, True),
        ("cuda", torch.bfloat16, 512, False),
        ("cuda", torch.float32, 64, False),
    ],
)
def test_heads_stay_in_groups_where_a_fused_kernel_takes_them(
    device: str, dtype: torch.dtype, width: int, taken: bool
) -> None:
    assert takes_groups(device, dtype, width) is taken


def test_groups_apart_are_the_same_attention() -> None:
    query, key, value = projections()
    apart = F.scaled_dot_product_attention(*groups_apart(query, key, value), is_causal=True).flatten(0, 1)[None]
    spread = [part.repeat_interleave(2, 1) for part in (key, value)]
    whole = F.scaled_dot_product_attention(query, *spread, is_causal=True)
    torch.testing.assert_close(apart, whole, rtol=0, atol=1e-6)


def test_scaling_is_honoured_and_dropout_refused() -> None:
    query, key, value = projections()

    def run(**options: Any) -> Tensor:
        return ragged_attention(nn.Identity(), query, key, value, None, segment_lengths=LENGTHS, **options)[0]

    with pytest.raises(RefusedError, match=r"must drop nothing inside attention, got 0\.5 in Identity"):
        run(dropout=0.5)
    torch.testing.assert_close(run(scaling=0.25), run())
    assert not torch.allclose(run(scaling=0.5), run())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_gradients(family: str, reentrant: bool, shape: Callable, load: Callable) -> None:
    def gradients(recompute: bool) -> list[Tensor]:
        model = load(shape(family)).train()
        if recompute:
            # the name in transformers 5.23; before it, the deprecated one
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        hidden(model, examples()).square().sum().backward()
        return [param.grad for param in model.get_decoder().parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_a_call_without_segments_is_refused(shape: Callable, load: Callable) -> None:
    with pytest.raises(RuntimeError, match="without segment_lengths"):
        load(shape("llama"))(input_ids=torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("lengths", [(5, 37), (127, 0), (*LENGTHS, 1)])
def test_segments_that_do_not_fill_the_row_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="segment_lengths must"):
        ragged_attention(nn.Identity(), *projections(), None, segment_lengths=lengths)


@pytest.mark.parametrize("extras", [{"position_bias": 1.0}, {"softcap": 3.0, "s_aux": torch.zeros(4)}])
def test_attention_that_it_cannot_compute_is_refused(extras: dict[str, Any]) -> None:
    with pytest.raises(UnheldError, match=next(iter(extras))):
        ragged_attention(nn.Identity(), *projections(), None, segment_lengths=LENGTHS, **extras)
