"""Under FSDP2 a parameter that moves in backward has the gradient of all ranks: losses and norms in the same bits."""

from pathlib import Path

import pytest

from benchmarks.matrix import Column, run_columns
from benchmarks.matrix_rows import write_rows

UNCLIPPED, MOVING = "train.max_grad_norm=inf", "optim.in_backward=true"


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "extra"), [("fsdp", ()), ("hsdp", ("strategy.shard_size=1",))])
def test_moving_in_backward_changes_no_bit(strategy: str, extra: tuple[str, ...], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, 10)
    after = Column("after", strategy, 2, 1, (*extra, UNCLIPPED))
    during = Column("during", strategy, 2, 1, (*extra, UNCLIPPED, MOVING))
    results = run_columns((after, during), rows, only=("tiny full full",))
    (one,), (other,) = (results[column.name].values() for column in (after, during))
    assert one["losses"][0] > 1.01 * one["losses"][-1]
    assert (one["losses"], one["norms"]) == (other["losses"], other["norms"])
