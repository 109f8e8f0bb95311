"""A profiled run of two ranks through the real command line: the table is shown and kept, each rank leaves a trace."""

import gzip
import json
from pathlib import Path

import pytest

from dsft import folder
from dsft.compose import compose
from tests.launch.processes import dsft, steps


@pytest.mark.slow
def test_the_table_is_shown_and_each_rank_leaves_a_trace(tmp_path: Path, rows: Path) -> None:
    run_dir = tmp_path / "run"
    words = [
        "model=tiny", "method=lora", "data=local", f"data.path={rows}", "train.precision=fp32", "train.steps=3",
        "train.global_batch_size=4", "tracker=[]", "launcher=local", "launcher.devices=2", "strategy=ddp",
        "checkpoint.verify_result=false", f"run_dir={run_dir}",
    ]  # fmt: skip
    done = dsft(*words, "train.profile=1")
    assert done.returncode == 0, done.stderr
    assert steps(run_dir) == [1, 2, 3]
    table = (run_dir / "profile" / "table.md").read_text()
    assert table in done.stdout
    seconds = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in table.splitlines()[4:17]}
    assert min(seconds[part] for part in ("GEMM of the base", "attention", "adapter", "communication")) > 0
    for rank in (0, 1):
        with gzip.open(run_dir / "profile" / f"trace-rank{rank}.json.gz") as file:
            assert any(event.get("name") == "gloo:all_reduce" for event in json.load(file)["traceEvents"])
    folder.check(run_dir, compose([*words, "train.profile=2"]).resolved)  # another value is no other configuration
