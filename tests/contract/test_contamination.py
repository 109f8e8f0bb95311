"""Examples that share a micro-batch never feel each other: what one holds changes not a bit of another's scores."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsft.comm.world import World
from dsft.compose import compose
from dsft.engine.assemble import Session, assemble

ATTENTION = {
    "plain": ["model.config.num_key_value_heads=4"],
    "grouped heads": [],
    "sliding window": ["model.config.model_type=mistral", "+model.config.sliding_window=16"],
}
"""Mixtures of experts are held to rounding in tests/unit/models: an expert's number of rows hangs on the neighbours."""

LENGTHS = (40, 33, 64, 2, 47)


def _session(method: str, attention: str) -> Session:
    """A tiny model whose adapters, too, hold random values: at the start they would give nothing."""
    run = compose(["model=tiny", f"method={method}", "train.precision=fp32", *ATTENTION[attention]]).run
    session = assemble(run, run.model.resolve(), World(0, 1, 0, torch.device("cpu")))
    torch.manual_seed(0)
    for param in session.model.parameters():
        if param.requires_grad:
            param.data += 0.05 * torch.randn(param.shape)
    session.model.eval()
    return session


@torch.no_grad()
def _scores(session: Session, rows: list[Tensor], lengths: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    """Of each example: logits (L, V), and -log p (L,) of the token after each of its own, the first after the last."""
    call: dict[str, Any] = {
        "input_ids": torch.cat(rows)[None], "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "segment_lengths": lengths, "use_cache": False,
    }  # fmt: skip
    logits = session.module(**call).logits[0]
    targets = torch.cat([row.roll(-1) for row in rows])
    scores = session.module(**call, logits_to_keep=torch.arange(len(targets)), targets=targets).logits[0]
    return list(zip(logits.split(LENGTHS), scores.split(LENGTHS), strict=True))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix", "prompt", "p_tuning"])
def test_replacing_an_example_changes_no_bit_of_another(method: str, attention: str) -> None:
    session = _session(method, attention)
    rows = [torch.randint(0, 250, (length,)) for length in LENGTHS]
    before = _scores(session, rows, LENGTHS)
    for index, row in enumerate(rows):
        others = [*rows[:index], (row + 1) % 250, *rows[index + 1 :]]
        after = _scores(session, others, LENGTHS)
        for place, (one, other) in enumerate(zip(before, after, strict=True)):
            assert [torch.equal(*pair) for pair in zip(one, other, strict=True)] == [place != index] * 2
    whole = (sum(LENGTHS),)  # taken for one example, they do feel each other: the bits show it
    before, after = _scores(session, rows, whole), _scores(session, [(rows[0] + 1) % 250, *rows[1:]], whole)
    assert not torch.equal(before[1][0], after[1][0])
    assert not torch.equal(before[1][1], after[1][1])
