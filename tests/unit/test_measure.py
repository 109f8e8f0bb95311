"""How the speed benchmarks put ranks and rounds together."""

import pytest
import torch

from benchmarks.measure import Peer, table, together
from benchmarks.timed import real_tokens


def _step(tokens: int, seconds: float, loss: float) -> dict[str, float]:
    return {"tokens": tokens, "supervised": 1, "positions": 2 * tokens, "seconds": seconds, "cpu_seconds": 2 * seconds,
            "loss": loss}  # fmt: skip


def test_ranks_are_summed_over_the_timed_steps_alone() -> None:
    parts = [
        {"steps": [_step(7, 99.0, 1.0), _step(300, 2.0, 3.0), _step(100, 2.0, 1.0)], "peak_mib": 10.0},
        {"steps": [_step(9, 99.0, 2.0), _step(100, 1.0, 5.0), _step(100, 1.0, 1.0)], "peak_mib": 30.0},
    ]
    found = together(parts)
    assert found["tok_s"] == 600 / 4.0  # the slower rank's seconds
    assert found["tok_cpu_s"] == 600 / 12.0
    assert found["padding"] == 0.5
    assert found["imbalance"] == pytest.approx((0.5 + 0.0) / 2)
    assert found["peak_mib"] == 40.0
    assert found["losses"] == [1.5, 4.0, 1.0]


def test_ratios_are_to_the_first_peer_of_the_same_round() -> None:
    def round_(speed: float) -> dict[str, object]:
        return {"tok_s": speed, "tok_cpu_s": 1.0, "share": 0.5, "padding": 0.25, "imbalance": 0.02,
                "peak_mib": 2 * speed, "losses": [1.0, 2.0, 3.0]}  # fmt: skip

    peers = {"plain": Peer("by hand", "", "fsdp"), "ours": Peer("ours", "", "fsdp")}
    found = {"plain": [round_(100), round_(1), round_(110)], "ours": [round_(300), round_(2.5), round_(341)]}
    assert list(table(found, peers, ranks=2)) == [
        "|  | real tokens/s | x plain | tokens/CPU-s | of the ceiling | padding | imbalance | peak MiB | x plain "
        "| losses at steps 1, 2, last |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| by hand | 100 | 1.00 | 1 | 50% | 25% | 2.0% | 200 | 1.00 | 1.0000, 2.0000, 3.0000 |",
        "| ours | 300 | 3.00 | 1 | 50% | 25% | 2.0% | 600 | 3.00 | 1.0000, 2.0000, 3.0000 |",
    ]


def test_padding_is_told_from_both_kinds_of_mask() -> None:
    assert real_tokens(torch.tensor([[1, 1, 0], [1, 1, 1]])) == 5
    low = torch.finfo(torch.float32).min
    packed = torch.tensor([[[[0.0, low, low], [low, 0.0, low], [low, low, low]]]])  # two examples and a pad
    assert real_tokens(packed) == 2
