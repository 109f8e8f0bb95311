"""Check A1: every method, five steps in fp32, against the numbers that a CPU gave (gpu_reference.json).

python -m benchmarks.gpu.methods   writes that file: the same code on a CPU
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import MOVES
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.runs import tiny_words, written_rows
from benchmarks.gpu.scene import Scene, measured, relative
from benchmarks.machine import here
from benchmarks.matrix import BASES, FILES, LADDER, RATES

REFERENCE = Path(__file__).parents[1] / "gpu_reference.json"
STEPS = 5
LOSS, NORM = 1e-4, 1e-3
"""Relative. A device sums in another order: 1e-6 of loss and norm in a step, which AdamW's division by a small second
moment makes more of."""
PACKED_LOSS, PACKED_NORM = 2e-3, 2e-2
"""On a base that the device has packed itself, some of whose levels are others (see packing.py), and where weights are
rounded to a grid in each step: what is half way goes either way."""
ROUNDED = {*BASES, "qat", "qat_lora"}


def methods(scene: Scene, facts: Facts) -> None:
    """Hold every method to the reference."""
    reference = json.loads(REFERENCE.read_text())
    facts.note("reference", reference["made on"])
    absent = sorted({path.stem for path in FILES} ^ set(reference["methods"]))
    facts.note("methods without a reference, or gone", absent, ok=not absent, why="python -m benchmarks.gpu.methods")
    rows = written_rows(scene)
    for method, wanted in reference["methods"].items():
        with facts.part(method):
            found = measured(scene, tiny_words(rows, method, rate=wanted["rate"]), STEPS)
            loss, norm = (PACKED_LOSS, PACKED_NORM) if method in ROUNDED and scene.cuda else (LOSS, NORM)
            facts.near(f"{method}: losses", relative(found.losses, wanted["losses"]), loss)
            facts.near(f"{method}: gradient norms", relative(found.norms, wanted["norms"]), norm)


def _made(scene: Scene, method: str) -> dict[str, Any]:
    rows = written_rows(scene)
    for factor in LADDER:
        rate = RATES["adamw"] * factor
        found = measured(scene, tiny_words(rows, method, rate=rate), STEPS)
        if found.moved >= MOVES:
            break
    return {"rate": rate, "losses": found.losses, "norms": found.norms}


def main() -> int:
    """Write the reference."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(torch.device("cpu"), Path(folder), time.monotonic() + 1e6)
        found = {path.stem: _made(scene, path.stem) for path in FILES}
    REFERENCE.write_text(json.dumps({"made on": here(), "methods": found}, indent=1) + "\n")
    print(f"{REFERENCE}: {len(found)} methods")
    return 0


if __name__ == "__main__":
    sys.exit(main())
