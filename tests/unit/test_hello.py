"""What the ranks say of each other: who differs, whose clock is off, which node is slow."""

from typing import Any

import pytest
from dsft_launchers.verdict import CannotBeginError

from dsft.comm.hello import _rounds, odd, require_same

RANKS = [{"rank": rank, "host": f"n{1 + rank // 2}"} for rank in range(4)]


def test_the_first_rank_that_differs_is_named_with_both_values() -> None:
    here = {"code": "a" * 64, "torch": "2.13.0"}
    there = {"code": "b" * 64, "torch": "2.12.1"}
    with pytest.raises(CannotBeginError) as refusal:
        require_same([here, here, there, there], RANKS)
    assert str(refusal.value) == (
        "rank 2 on n2 (and 1 more) has code bbbbbbbbbbbb, rank 0 on n1 has aaaaaaaaaaaa; "
        "rank 2 on n2 (and 1 more) has torch 2.12.1, rank 0 on n1 has 2.13.0; "
        "all must be alike: bring the nodes in line, then start again"
    )


def test_a_rank_that_did_not_look_is_not_compared() -> None:
    require_same([{"base model": "a", "data": "d"}, {"data": "d"}, {"base model": "a", "data": "d"}], RANKS)
    with pytest.raises(CannotBeginError, match="rank 2 on n2 has base model b, rank 0 on n1 has a"):
        require_same([{"base model": "a"}, {}, {"base model": "b"}], RANKS)


def test_a_clock_that_is_off_is_told_once_per_host() -> None:
    ranks = [{**rank, "clock_s": seconds} for rank, seconds in zip(RANKS, (0.0, 0.1, -40.0, -40.1), strict=True)]
    assert list(odd({"ranks": ranks})) == [("clock", {"host": "n2", "seconds": -40.1})]
    assert list(odd({"ranks": [{"rank": 0, "pid": 1, "host": "n1"}]})) == []


@pytest.mark.parametrize(
    ("across", "slow"),
    [
        ({"n1": 0.1, "n2": 0.12, "n3": 0.37}, ["n3"]),
        ({"n1": 0.1, "n2": 0.12, "n3": 0.35}, []),
        ({"n1": 0.1, "n2": 0.4}, ["n2"]),
        ({"n1": 0.4, "n2": 0.4}, []),
    ],
)
def test_a_node_slower_than_three_medians_is_told_of(across: dict[str, float], slow: list[str]) -> None:
    nodes = {host: {"across_s": seconds} for host, seconds in across.items()}
    found: list[tuple[str, dict[str, Any]]] = list(odd({"ranks": RANKS, "all_reduce": {"nodes": nodes}}))
    assert [(event, details["host"], details["what"]) for event, details in found] == [
        ("slow_node", host, "across") for host in slow
    ]


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_no_rank_is_in_two_groups_of_a_round_and_every_node_meets_both_neighbours(count: int) -> None:
    hosts = [f"n{node}" for node in range(count) for _ in range(2)]
    rounds = _rounds(hosts)
    for groups in rounds.values():
        together = [rank for group in groups for rank in group]
        assert len(together) == len(set(together))
    pairs = {
        frozenset(hosts[rank] for rank in group)
        for name, groups in rounds.items()
        if name.startswith("pair")
        for group in groups
    }
    assert pairs == {frozenset((f"n{node}", f"n{(node + 1) % count}")) for node in range(count)}


def test_one_node_is_timed_once() -> None:
    assert _rounds(["n1", "n1"]) == {"all": [[0, 1]]}
