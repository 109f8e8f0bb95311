"""How the speed benchmarks put ranks and rounds together."""

import math
import threading
from pathlib import Path

import pytest
import torch

from benchmarks.job import Turns
from benchmarks.measure import Peer, pairs, together
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


def test_a_row_holds_ours_to_the_one_beside_it() -> None:
    def run(speed: float) -> dict[str, object]:
        return {"tok_s": speed, "tok_cpu_s": speed / 2, "share": speed / 1000, "padding": 0.25, "imbalance": 0.02,
                "peak_mib": 6000 / speed, "losses": [1.0, 2.0, 3.0]}  # fmt: skip

    peers = {"ours": Peer("ours", "", "fsdp"), "plain": Peer("by hand", "", "fsdp")}
    row = list(pairs({"plain": (run(300), run(100))}, peers))[-1]
    assert row == (
        "| by hand | 100 | 300 | **3.00** | 3.00 | 10% | 30% | 25% | 2.0% | 2.0% | 60 | 20 | **0.33** "
        "| 1.0000, 2.0000, 3.0000 | 1.0000, 2.0000, 3.0000 |"
    )


def test_peers_take_their_steps_in_turns(tmp_path: Path) -> None:
    order: list[tuple[int, int]] = []

    def peer(index: int) -> None:
        turns = Turns(tmp_path, index, 2)
        for done in range(1, 4):
            turns.wait(done)
            order.append((done, index))
        turns.wait(math.inf)

    threads = [threading.Thread(target=peer, args=(index,)) for index in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert order == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]


def test_padding_is_told_from_both_kinds_of_mask() -> None:
    assert real_tokens(torch.tensor([[1, 1, 0], [1, 1, 1]])) == 5
    low = torch.finfo(torch.float32).min
    packed = torch.tensor([[[[0.0, low, low], [low, 0.0, low], [low, low, low]]]])  # two examples and a pad
    assert real_tokens(packed) == 2
