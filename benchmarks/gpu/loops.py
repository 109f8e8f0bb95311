"""A rank of check E: sums in a loop, watched as a run's steps are, until it is stopped; loops.py FOLDER [FAULT].

It meets, joins, is patient and leaves by dsft's own code; only there is no model. FAULT raises: rank 1 raises in a
step; sleeps: rank 1 takes 1.5 s in a step while the others wait for it; stops: somebody will stop rank 1.
"""

import os
import sys
import time
import traceback
from pathlib import Path

import torch
from dsft_launchers.codes import CRASHED, DONE, STOPPED
from dsft_launchers.join import resolve

from benchmarks.gpu.cells_apart import apart

READY = 5
"""Steps after which the median says how long one takes."""
MARGINS_S = {"stops": 1.5}
"""Patience beyond what a step takes; where no rank is to be stopped, so much that a busy machine never tries it."""
LONG_S = 60.0


def main() -> int:
    """As dsft.job does: a crash is its code."""
    os.environ.update(resolve("auto", os.environ, devices="auto", nodes=1).variables)
    apart()
    folder, fault = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    try:
        return _work(folder, fault)
    except Exception:  # the last fence, as in dsft.job
        traceback.print_exc()
        return CRASHED


def _work(folder: Path, fault: str) -> int:
    from dsft.comm.world import join, leave
    from dsft.engine.limits import Limits
    from dsft.engine.patience import Patience
    from dsft.engine.stop import StopFlag

    stop = StopFlag(None)
    stop.bind()
    world = join()
    value = torch.ones(2**20, device=world.device)
    with Patience(MARGINS_S.get(fault, LONG_S), Limits(10**6, 10**5, world.device.type)) as patience:
        for step in range(10**6):
            with patience.limit(step, tokens=1):
                if step == READY + 1 and world.rank == 1:
                    _happen(fault)
                total = world.sum(value)
                asked, off = world.max(stop.reason is not None, float(total[0].item() != world.size))
            if off:
                raise RuntimeError("the sum of ones is not the number of ranks")
            if asked:
                leave()
                return STOPPED
            if step == READY:
                _write(folder / f"rank-{world.rank}", str(os.getpid()))
    return DONE


def _happen(fault: str) -> None:
    if fault == "raises":
        raise RuntimeError("planted")
    if fault == "sleeps":
        time.sleep(1.5)


def _write(path: Path, text: str) -> None:
    fresh = path.with_suffix(".tmp")
    fresh.write_text(text)
    fresh.replace(path)


if __name__ == "__main__":
    from dsft.entry import enter

    enter(main)
