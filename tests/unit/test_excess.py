"""What the fullest rank holds of a stack of experts, as the plan counts it, is what FSDP2 gives it."""

import json
import subprocess
import sys

import pytest

from dsft.strategies.fsdp import FSDP, _excess

STACKS = {
    "mixtral": [(8, 28672, 4096), (8, 4096, 14336)],
    "qwen3": [(128, 1536, 2048), (128, 2048, 768)],
}
"""The stacks of Mixtral-8x7B and Qwen3-30B-A3B: gate and up, down."""
SHARED = """
import json, sys, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from dsft.moved import stack
from dsft.strategies.fsdp import _placement, move_uneven
from functools import partial
for shape, ranks in json.loads(sys.argv[1]):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    module = torch.nn.Module()
    with torch.device("meta"):
        module.stack = torch.nn.Parameter(torch.empty(shape))
    module.multiplies_stacks = True
    move_uneven(module, ranks)
    fully_shard(module, mesh=init_device_mesh("cpu", (ranks,)), shard_placement_fn=partial(_placement, ranks))
    assert stack(module, "stack").shape == tuple(shape)
    print(module.stack.to_local().numel() * ranks / module.stack.numel())
    torch.distributed.destroy_process_group()
"""
CASES = [((8, 28672, 4096), 64), ((8, 4096, 14336), 48), ((8, 28672, 4096), 3), ((128, 2048, 768), 48)]


def _fsdp() -> FSDP:
    return FSDP(reshard=True, keep_unsharded=False, offload="none", shard_size=None)


@pytest.mark.parametrize("ranks", [3, 16, 48, 64])
@pytest.mark.parametrize("model", STACKS)
def test_experts_are_shared_out_evenly(model: str, ranks: int) -> None:
    found = [_fsdp().excess(shape, ranks, movable=True) for shape in STACKS[model]]
    assert found == pytest.approx([1.0, 1.0], abs=0.01)
    if model == "mixtral":  # by whole experts
        assert _fsdp().excess((8, 7, 7), ranks, movable=False) == _excess(8, ranks)
        assert _excess(8, ranks) == {3: 1.125, 16: 2, 48: 6, 64: 8}[ranks]


def test_fsdp2_shares_them_out_so() -> None:
    command = [sys.executable, "-c", SHARED, json.dumps(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = [_fsdp().excess(shape, ranks, movable=True) for shape, ranks in CASES]
    assert [float(line) for line in done.stdout.split()] == told


def test_rows_and_numbers_are_shared_out_by_rows() -> None:
    assert _fsdp().excess((100, 3), 64, movable=True) == 1.28
    assert _fsdp().excess((), 4, movable=False) == 4.0
    assert _fsdp().excess((0, 3, 4), 4, movable=True) == 1.0
