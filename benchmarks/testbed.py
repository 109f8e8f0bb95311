"""A real SLURM on this machine for as long as a test or a benchmark needs one (slurm/testbed; root)."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TESTBED = Path(__file__).parents[1] / "slurm" / "testbed"


@dataclass(frozen=True)
class Testbed:
    """One that is up. folder: its settings, logs and state; gpus: that each node pretends to have."""

    __test__ = False
    folder: Path
    port: int
    accounting: bool
    gpus: int = 0

    @property
    def conf(self) -> Path:
        """What SLURM_CONF must name."""
        return self.folder / "etc" / "slurm.conf"

    def __call__(self, *words: str) -> str:
        """What a command of slurm/testbed prints. Raises RuntimeError with its own words."""
        settings = {
            "SLURM_TESTBED_DIR": str(self.folder), "SLURM_TESTBED_PORT": str(self.port),
            "SLURM_TESTBED_SACCT": str(int(self.accounting)), "SLURM_TESTBED_GPUS": str(self.gpus),
        }  # fmt: skip
        done = subprocess.run(
            [str(TESTBED), *words], env=os.environ | settings, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"slurm/testbed {' '.join(words)}: {done.stderr}")
        return done.stdout

    def configure(self, without: str, *lines: str) -> None:
        """Give SLURM other settings: no line that holds without, and lines besides."""
        kept = [line for line in self.conf.read_text().splitlines() if without not in line]
        self.conf.write_text("\n".join([*kept, *lines]) + "\n")
        subprocess.run(["scontrol", "reconfigure"], check=True, env=os.environ | {"SLURM_CONF": str(self.conf)})


@contextmanager
def slurm_here(port: int, *, accounting: bool, gpus: int = 0) -> Iterator[Testbed]:
    """Four nodes, from this port on; gone at the end. accounting: with slurmdbd, which takes seconds more.

    gpus: of each node; SLURM deals them out, and nothing computes on them.
    """
    bed = Testbed(Path(tempfile.mkdtemp(prefix="dsft-slurm-", dir="/tmp")), port, accounting, gpus)
    bed.folder.chmod(0o755)  # its data base has a user of its own
    try:
        bed("up")
        yield bed
    finally:
        bed("down")
        shutil.rmtree(bed.folder)
