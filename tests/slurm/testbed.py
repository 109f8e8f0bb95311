"""A real SLURM on this machine, up for as long as it is wanted."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TESTBED = Path(__file__).parents[2] / "slurm" / "testbed"


@contextmanager
def started(worker_id: str, *, accounting: bool) -> Iterator[Callable[..., str]]:
    """A testbed that is up, and down afterwards. accounting: with slurmdbd, which takes seconds more."""
    number = int(worker_id.removeprefix("gw")) if worker_id.startswith("gw") else 0
    settings = {
        "SLURM_TESTBED_DIR": f"/tmp/dsft-slurm-{os.getpid()}",
        "SLURM_TESTBED_PORT": str(18000 + 200 * number),
        "SLURM_TESTBED_SACCT": str(int(accounting)),
    }

    def run(*words: str) -> str:
        command = [str(TESTBED), *words]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        run("up")
        yield run
    finally:
        run("down")
        shutil.rmtree(settings["SLURM_TESTBED_DIR"])
