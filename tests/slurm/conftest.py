"""A real SLURM of four nodes on this machine, for as long as the tests of this folder run."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.matrix_rows import write_rows
from benchmarks.testbed import Testbed, slurm_here

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is no SLURM to start, say so in one line."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    why = None
    if os.geteuid() != 0:
        why = "a real SLURM is started by root only"
    elif missing := [name for name in NEEDED if shutil.which(name) is None]:
        why = f"{missing[0]} is not installed; make slurm-test installs what SLURM needs"
    for item in items:
        if why and Path(__file__).parent in Path(str(item.path)).parents:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def port(worker_id: str) -> int:
    """From here on are this worker's."""
    return 18000 + 200 * (int(worker_id.removeprefix("gw")) if worker_id.startswith("gw") else 0)


@pytest.fixture(scope="module")
def bed(port: int) -> Iterator[Testbed]:
    with slurm_here(port, accounting=False) as up:
        yield up


@pytest.fixture
def cluster(bed: Testbed, monkeypatch: pytest.MonkeyPatch) -> Testbed:
    """The testbed; commands of SLURM that are run in the test find it."""
    monkeypatch.setenv("SLURM_CONF", str(bed.conf))
    return bed


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, 10)
    return path
