"""Whole steps on a device that is not the host, without one: methods, quantizations, strategies (benchmarks/blind.py).

An operator that mixes host and device ends a cell with an error; what makes the host wait for its device is bounded.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import warm
from tests.contract.sessions import METHODS

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA of its own")
STRATEGIES = ("single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
PACKED = ("none", "nf4", "int8")
OWN = {"qlora": "nf4", "int8_lora": "int8"}
"""Methods that mean a base packed so, and no other."""
WHOLE = "whole-model-on-packed-base"
UNPACKED = {
    "full": WHOLE, "freeze": WHOLE, "qat": WHOLE, "qat_lora": "rounded-on-packed-base",
    "diff_pruning": "sparse-difference-on-packed-base",
}  # fmt: skip
"""Method -> the rule that refuses a packed base for it."""
SETTLED = {"adalora": ["method.warmup=0", "method.final=8"], "diff_pruning": ["method.final=8"]}
"""What prunes does so at step 2 of 10."""
RANKS = {"ddp": "lora", "fsdp": "adalora", "hsdp": "dora", "zero1": "diff_pruning", "zero2": "full", "zero3": "prefix"}
"""Strategy -> the method that is tried with it on four ranks in every run of the tests."""

VARIANTS = {
    "experts": ["model=tiny_moe", "method=qlora", "strategy=fsdp"],
    "bf16 recomputed": [
        "method=full", "strategy=fsdp", "train.precision=bf16", "train.gradient_checkpointing=selective",
    ],
    "activations offloaded": ["method=lora", "strategy=single", "train.offload_activations=true"],
    "fsdp offloaded": ["method=lora", "strategy=fsdp", "strategy.offload=parameters"],
    "zero3 offloaded": ["method=lora", "strategy=zero3", "strategy.offload=parameters"],
    "moved in backward": [
        "method=full", "strategy=single", "optim.in_backward=true", "train.max_grad_norm=inf",
        "train.on_nonfinite=stop",
    ],
    "evaluated": ["method=prefix", "strategy=single", "data.eval_size=2"],
}  # fmt: skip
"""Cells of options that change where something lies or when it moves."""

LOSS, NORM = "engine/tally.py measured: copy to host", "strategies/update.py step: _local_scalar_dense"
STOP = "comm/world.py max: copy to host"
ZERO = {"strategies/zero.py step: _local_scalar_dense": 4, "strategies/zero.py step: number to device": 2}
"""DeepSpeed's own, with two groups of parameters, the most that a method has: overflow, and norms of each."""
PENALTY = {"engine/guided.py _penalize: _local_scalar_dense": 1}
MORE = {"adalora": {**PENALTY, "methods/allocator.py after_step: copy to host": 1}, "diff_pruning": PENALTY}
"""Method -> waits of a step that it adds."""
TURNS = ("single", "zero3", "single", "zero2", "fsdp", "ddp", "single", "zero1", "single")
COVER = {
    f"{method} {strategy} {packed}"
    for index, method in enumerate(METHODS)
    for strategy in (TURNS[index % len(TURNS)],)
    for packed in ("none" if method in UNPACKED else OWN.get(method, PACKED[index % len(PACKED)]),)
}
"""Each method once, with strategies and quantizations in turn; hsdp, the slowest, is among those of four ranks."""

STRAYED = "houlsby single none"
STRAYS = {
    "forward-on-host": "aten::add.Tensor got cuda:1 and cpu",
    "drawn-by-host": "aten::normal_ got cuda and a generator on cpu",
    "terms-on-host": "aten::div.Tensor got cpu and cuda:1",
    "terms-to-numpy": "can't convert cuda:1 device type tensor to numpy",
    "indices-on-host": "aten::index.Tensor got cuda:1 and cpu",
    "values-on-host": "aten::add_.Tensor got cuda:1 and cpu",
}
"""What is planted -> what the error says."""
WAITS = {
    "forward-by-host": {f"methods/bottleneck.py _on_first: copy to {where}" for where in ("host", "device")},
    "look-at-loss": {"engine/forward.py forward: _local_scalar_dense"},
    "copied-from-pageable": {"objective.py to: copy to device"},
}
"""What is planted and right, but waits -> where."""


def words(name: str, ranks: int = 1) -> list[str]:
    method, strategy, packed = name.split()
    shards = ["strategy.shard_size=2"] if strategy == "hsdp" and ranks > 1 else []
    return [
        "model=tiny", f"method={method}", f"strategy={strategy}", f"quantization={packed}", *shards,
        *SETTLED.get(method, []),
    ]  # fmt: skip


FOUR = {f"{method} {strategy} none" for strategy, method in RANKS.items()}


def run(cells: Mapping[str, Sequence[str]], folder: Path, ranks: int = 1, **more: Any) -> dict[str, dict[str, Any]]:
    """What the cells gave, by name."""
    job = {"cells": cells, "ranks": ranks, "cache": os.environ["DSFT_CACHE"], **more}
    (folder / "job.json").write_text(json.dumps(job))
    done = warm.run("benchmarks.blind", folder / "job.json")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("name"): line for line in lines}


def excess(name: str, cell: Mapping[str, Any]) -> dict[str, int]:
    """Waits of the last step beyond their bounds; two micro-batches have none."""
    method, strategy, _ = name.split()
    bounds = {LOSS: 1, NORM: 1, STOP: 1, **MORE.get(method, {}), **(ZERO if strategy.startswith("zero") else {})}
    return {place: count for place, count in cell["waits"].items() if count > bounds.get(place, 0)}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    strays = {name: name for name in (*STRAYS, *WAITS)}
    every = {name: words(name) for name in sorted(COVER)} | {name: words(STRAYED) for name in strays}
    every |= {name: ["model=tiny", *more] for name, more in VARIANTS.items()}
    return run(every, tmp_path_factory.mktemp("alone"), strays=strays)


@pytest.fixture(scope="module")
def cells_of_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run({name: words(name, 4) for name in sorted(FOUR)}, tmp_path_factory.mktemp("four"), ranks=4)


@pytest.mark.parametrize("name", sorted(COVER))
def test_a_whole_step_keeps_to_its_device(name: str, cells: dict[str, dict[str, Any]]) -> None:
    whole(name, cells[name])


@pytest.mark.parametrize("name", sorted(FOUR))
def test_on_four_ranks_too(name: str, cells_of_four: dict[str, dict[str, Any]]) -> None:
    whole(name, cells_of_four[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_options_that_move_things_keep_to_it_as_well(name: str, cells: dict[str, dict[str, Any]]) -> None:
    sound(cells[name])


def sound(cell: Mapping[str, Any]) -> None:
    assert "error" not in cell, cell["error"]
    assert "refused" not in cell, cell["refused"]
    assert cell["micro_batches"] == 2
    assert all(map(math.isfinite, cell["losses"] + cell["norms"]))


def whole(name: str, cell: Mapping[str, Any]) -> None:
    sound(cell)
    assert excess(name, cell) == {}


@pytest.mark.parametrize("stray", STRAYS)
def test_a_planted_mix_of_host_and_device_is_found(stray: str, cells: dict[str, dict[str, Any]]) -> None:
    assert STRAYS[stray] in cells[stray]["error"]


@pytest.mark.parametrize("stray", WAITS)
def test_a_planted_wait_is_counted_where_it_is(stray: str, cells: dict[str, dict[str, Any]]) -> None:
    assert WAITS[stray] <= excess(STRAYED, cells[stray]).keys()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_combination_keeps_to_its_device_or_is_refused(tmp_path: Path) -> None:
    product = [f"{m} {s} {p}" for m in METHODS for p in PACKED for s in STRATEGIES]
    found = run({name: words(name) for name in product}, tmp_path)
    host = run({name: words(name) for name in product if " single " in name}, tmp_path, host=True)
    for name in product:
        method, _, packed = name.split()
        if by := refusal(method, packed):
            assert found[name]["by"] == f"rule {by}", name
            continue
        whole(name, found[name])
        assert found[name]["losses"] == pytest.approx(host[f"{method} single {packed}"]["losses"], rel=1e-4), name
    four = run({n: words(n, 4) for n in product if n.endswith(" none") and " single " not in n}, tmp_path, ranks=4)
    for name, cell in four.items():
        if not refusal(name.split()[0], "none"):
            whole(name, cell)


def refusal(method: str, packed: str) -> str | None:
    """The rule that refuses this method on a base packed so."""
    if method in OWN and OWN[method] != packed:
        return "qlora-without-4-bit" if method == "qlora" else "int8-lora-without-8-bit"
    return UNPACKED.get(method) if packed != "none" else None
