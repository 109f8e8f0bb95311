"""Memory of the GPUs that a process may use, by an nvidia-smi of our own on PATH."""

import os
from pathlib import Path

import pytest

from dsft.telemetry.cards import device_memory_bytes

GIB = 2**30
LISTED = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
GPU 1: NVIDIA L4 (UUID: GPU-bbbb)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-cccc)
  MIG 3g.20gb     Device  0: (UUID: MIG-c0)
  MIG 1g.5gb+me   Device  1: (UUID: MIG-c1)
"""
TOTALS = "GPU-aaaa, 81559\nGPU-bbbb, 23034\nGPU-cccc, 40960\n"


def _put(folder: Path, monkeypatch: pytest.MonkeyPatch, listed: str, totals: str, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    (folder / "listed").write_text(listed)
    (folder / "totals").write_text(totals)
    program.write_text(f'#!/bin/sh\n[ "$1" = -L ] && cat {folder}/listed || cat {folder}/totals\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("visible", "order", "expected"),
    [
        (None, None, 20 * 0.95),
        ("0", "PCI_BUS_ID", 81559 / 1024),
        ("1", "PCI_BUS_ID", 23034 / 1024),
        ("0", None, 20 * 0.95),
        ("GPU-aaaa", None, 81559 / 1024),
        ("GPU-a,GPU-bbbb", None, 23034 / 1024),
        ("MIG-c1", None, 5 * 0.95),
        ("MIG-c0", None, 20 * 0.95),
        ("2", "PCI_BUS_ID", 20 * 0.95),
        ("GPU-aaaa,-1,GPU-bbbb", None, 81559 / 1024),
        ("", None, None),
        ("-1", None, None),
        ("7", "PCI_BUS_ID", None),
    ],
)
def test_memory_is_of_what_may_be_used(
    visible: str | None, order: str | None, expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(tmp_path, monkeypatch, LISTED, TOTALS)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if order is not None:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    assert device_memory_bytes() == (None if expected is None else pytest.approx(expected * GIB))


@pytest.mark.parametrize("totals", ["", "No devices were found\n", "GPU-aaaa, [N/A]\n", "Failed to initialize NVML\n"])
def test_where_it_does_not_tell_nothing_is_known(totals: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put(tmp_path, monkeypatch, "", totals, code=9)
    assert device_memory_bytes() is None
