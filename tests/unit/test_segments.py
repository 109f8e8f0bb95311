"""When torch's allocator is told to grow its segments: asked of NVIDIA's library, of which a small one stands in."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dsft.comm.segments import NAME, OLDER, VALUE, prefer_expandable

SOURCE = """
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return atoi(getenv("FAKE_INIT")); }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *gpu, int index) { *gpu = 70 + index; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int gpu) {
    *value = attribute == 102 && (gpu == 70 || atoi(getenv("FAKE_MAPS")));
    return 0;
}
int cuDeviceGetName(char *name, int length, int gpu) { strncpy(name, getenv("FAKE_NAME"), length); return 0; }
"""
"""Two GPUs; the second one maps memory where FAKE_MAPS says so."""
GOOD = {"FAKE_INIT": "0", "FAKE_MAPS": "1", "FAKE_NAME": "NVIDIA H100 80GB HBM3"}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.c").write_text(SOURCE)
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, folder / "cuda.c"], check=True)
    return library


@pytest.mark.parametrize(
    ("fake", "given", "grows"),
    [
        ({}, {}, True),
        ({"FAKE_MAPS": "0"}, {}, False),  # a vGPU, a Jetson
        ({"FAKE_NAME": "NVIDIA A100-SXM4-80GB MIG 3g.40gb"}, {}, False),
        ({"FAKE_INIT": "100"}, {}, False),
        ({}, {"CUDA_VISIBLE_DEVICES": ""}, False),
        ({}, {NAME: "max_split_size_mb:64"}, False),
        *(({}, {name: ""}, False) for name in OLDER),
        ({}, {"TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK": "1"}, False),
    ],
    ids=str,
)
def test_segments_grow_where_every_gpu_can_and_nobody_said_otherwise(
    fake: Mapping[str, str], given: Mapping[str, str], grows: bool, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**GOOD, **fake}.items():
        monkeypatch.setenv(name, value)
    env = {"CUDA_VISIBLE_DEVICES": "0,1", **given}
    before = dict(env)
    prefer_expandable(env, str(driver))
    assert env == ({**before, NAME: VALUE} if grows else before)


def test_nothing_is_set_without_nvidias_library(tmp_path: Path) -> None:
    env = {"CUDA_VISIBLE_DEVICES": "0,1"}
    prefer_expandable(env, str(tmp_path / "libcuda.so.1"))
    assert NAME not in env


CODE = f"""
import os, torch
os.environ[{NAME!r}] = "expandable_segments:neither"
torch._C._accelerator_setAllocatorSettings("max_split_size_mb:64")
"""


def test_torch_reads_the_variable_when_its_allocator_is_first_used() -> None:
    env = {name: value for name, value in os.environ.items() if name not in OLDER}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False)
    assert "got 'neither'" in done.stderr
