"""Accounts, on a SLURM that knows some: it has a data base."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.testbed import Testbed, slurm_here
from tests.launch.processes import dsft


@pytest.fixture(scope="module")
def bed(port: int) -> Iterator[Testbed]:
    if missing := [name for name in ("slurmdbd", "mariadbd") if shutil.which(name) is None]:
        pytest.skip(f"{missing[0]} is not installed; make slurm-test installs what SLURM needs")
    with slurm_here(port, accounting=True) as up:
        yield up


@pytest.mark.usefixtures("cluster")
def test_an_unknown_account_is_refused_with_those_that_there_are(rows: Path, tmp_path: Path) -> None:
    words = ["model=tiny", "data=local", f"data.path={rows}", "tracker=[]", "launcher=slurm", "launcher.wait=false"]
    done = dsft(*words, f"run_dir={tmp_path / 'run'}", "launcher.account=nobody")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dsft: launcher.account must be one of root, got nobody\n"
    assert not (tmp_path / "run").exists()
    known = dsft(*words, f"run_dir={tmp_path / 'run'}", "launcher.account=root", "+launcher.extra.begin=now+1hour")
    assert known.returncode == 0, known.stderr
