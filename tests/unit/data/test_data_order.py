import pytest

from dsft.data.order import batch_rows, steps_for
from dsft.data.packing import pack, plan_step, split


def _stream(steps: int, **keys: int | bool) -> list[int]:
    return [row for step in range(1, steps + 1) for row in batch_rows(step, **keys)]  # type: ignore[arg-type]


def test_each_epoch_is_a_permutation_and_batches_cross_its_border() -> None:
    stream = _stream(10, seed=3, num_rows=10, batch_size=4, shuffle=True)
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_does_not_depend_on_the_batch_size() -> None:
    small = _stream(30, seed=1, num_rows=7, batch_size=2, shuffle=True)
    large = _stream(4, seed=1, num_rows=7, batch_size=15, shuffle=True)
    assert small == large
    assert small != _stream(30, seed=2, num_rows=7, batch_size=2, shuffle=True)


def test_order_is_the_same_in_every_version() -> None:
    assert batch_rows(1, seed=0, num_rows=10, batch_size=10, shuffle=True) == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


def test_without_shuffle_rows_come_in_file_order() -> None:
    assert batch_rows(2, seed=0, num_rows=5, batch_size=3, shuffle=False) == [3, 4, 0]


def test_steps_for_covers_the_epochs() -> None:
    assert steps_for(1, num_rows=10, batch_size=4) == 3
    assert steps_for(2.0, num_rows=10, batch_size=4) == 5
    assert steps_for(0.1, num_rows=30, batch_size=3) == 1
    assert steps_for(0.01, num_rows=10, batch_size=4) == 1


LENGTHS = [30, 5, 12, 40, 7, 7, 22, 3]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_split_gives_each_example_to_one_rank_and_balances(ranks: int) -> None:
    parts = split(LENGTHS, ranks)
    assert sorted(index for part in parts for index in part) == list(range(8))
    loads = [sum(LENGTHS[index] for index in part) for part in parts]
    assert min(map(len, parts)) >= 1
    assert max(loads) <= max(max(LENGTHS), 4 / 3 * sum(LENGTHS) / ranks)  # the bound of longest-first (Graham 1969)


def test_split_refuses_fewer_examples_than_ranks() -> None:
    with pytest.raises(
        ValueError, match=r"train.global_batch_size must be at least the number of data ranks \(3\), got 2"
    ):
        split([5, 5], 3)


def test_pack_keeps_the_budget_and_lets_the_long_run_alone() -> None:
    micros = pack(LENGTHS, 35)
    assert sorted(index for micro in micros for index in micro) == list(range(8))
    assert [3] in micros
    assert all(sum(LENGTHS[index] for index in micro) <= 35 for micro in micros if micro != [3])


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_plan_gives_every_rank_equally_many_micro_batches_and_each_example_weight_once(ranks: int) -> None:
    plans = plan_step(LENGTHS, ranks, 35)
    assert len({len(plan) for plan in plans}) == 1
    loud = [index for plan in plans for micro in plan if not micro.silent for index in micro.examples]
    assert sorted(loud) == list(range(8))
    for plan in plans:
        silent = [micro.examples for micro in plan if micro.silent]
        assert silent == [plan[0].examples[:1]] * len(silent)
        assert not plan[0].silent


def test_plan_of_unequal_ranks_has_silent_micro_batches() -> None:
    assert [micro.silent for micro in plan_step([100, 10, 10], 2, 10)[0]] == [False, True]
