"""Nodes with GPUs (device files that compute nothing): what each rank's srun sets, and what is refused before a job."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dsft_launchers import gpus, submit

from benchmarks.testbed import Testbed, slurm_here
from dsft import dispatch
from dsft.comm.sight import without_cuda
from dsft.compose import compose
from tests.launch.processes import dsft
from tests.launch.refusals import good, is_refused

STEP = ["srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "sh", "-c"]
"""As the job starts its ranks."""
SAY = 'echo "said $SLURM_PROCID $SLURM_LOCALID $CUDA_VISIBLE_DEVICES $SLURM_STEP_GPUS $SLURM_GPUS_ON_NODE"'

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def bed(port: int) -> Iterator[Testbed]:
    with slurm_here(port, accounting=False, gpus=2) as up:
        yield up


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ([], ["0,1 0,1", "0,1 0,1"]),
        (["launcher.bind_gpus=true"], ["0 0", "1 1"]),
        (["+launcher.extra.gres='gpu:2'"], ["0,1 0,1", "0,1 0,1"]),
        (["launcher.gpus=none"], [" ", " "]),
    ],
    ids=["all of the node", "bound", "in sbatch's words", "none"],
)
def test_each_rank_sees_what_was_asked_for(
    words: list[str], seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")  # as in a job that asked for it, from which this one is submitted
    composed = compose(["model=tiny", "launcher=slurm", "launcher.nodes=2", "launcher.devices=2", *words])
    request = dispatch.request(composed, None, tmp_path)
    submit.check(request, tmp_path)
    folder = tmp_path / "slurm"
    job = submit.submit(request, [*STEP, SAY], folder)
    subprocess.run(["scontrol", "release", job], check=True)
    log, until = folder / f"{job}.log", time.monotonic() + 60
    while not log.is_file() or log.read_text().count("said ") < 4:
        assert time.monotonic() < until, log.read_text() if log.is_file() else "no log"
        time.sleep(0.1)
    said = sorted(line.removeprefix("said ") for line in log.read_text().splitlines() if line.startswith("said "))
    on_node = "" if words == ["launcher.gpus=none"] else "2"
    assert said == [f"{rank} {rank % 2} {seen[rank % 2]} {on_node}" for rank in range(4)]


def test_a_partitions_gpus_are_one_for_each_process() -> None:
    assert gpus.of_partition(None) == 2
    assert compose(["model=tiny", "launcher=slurm"]).start.devices == 2


def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    composed = compose(["model=tiny", "launcher=slurm", "launcher.devices=3"])
    with pytest.raises(ValueError, match=r"^launcher\.devices must be at most 2, the GPUs of a node of partition low"):
        submit.check(dispatch.request(composed, None, tmp_path), tmp_path)


@pytest.mark.skipif(not without_cuda(), reason="this torch is a build for CUDA")
def test_a_torch_without_cuda_is_refused_for_nodes_with_gpus(tmp_path: Path) -> None:
    words = ["model=tiny", "launcher=slurm", "tracker=[]", "train.steps=1", f"run_dir={tmp_path / 'run'}"]
    is_refused(dsft(*words, *good(tmp_path)), "torch must be a build for CUDA on nodes with GPUs, got 2.")
    assert not (tmp_path / "run").exists()
