"""Check B: two ranks on one device, over the collectives that it has, held to one rank.

NCCL refuses two ranks on one GPU of one host; with a host id for each it takes them for two hosts and talks over
sockets (see cells_apart.py). Rank 1 has local rank 1 and sees one device, as under srun --gpus-per-task=1.
"""

import os
import threading
from collections.abc import Mapping
from typing import Any

from benchmarks.cells import Measured
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.runs import tiny_words, written_rows
from benchmarks.gpu.scene import Scene, measured, relative
from benchmarks.groups import Crew, Journal, Spec, run

RATE, STEPS = 1e-3, 4
EXACT, ROUNDED = 1e-5, 3e-2
"""Relative, of losses: ranks add in another order; in bf16 each casts at its own places."""
CASES = (
    ("lora", "fsdp", "fp32"), ("lora", "ddp", "fp32"), ("full", "fsdp", "fp32"), ("lora", "zero2", "fp32"),
    ("lora", "zero3", "fp32"), ("full", "fsdp", "bf16"), ("qlora", "zero3", "bf16"), ("qlora", "fsdp", "fp32"),
    ("qlora", "fsdp", "bf16"),
)  # fmt: skip
"""What is likeliest to crash stands last: a group that does is started anew for what is left."""
HUNG_S = 30.0


def two_ranks(scene: Scene, facts: Facts) -> None:
    """Losses and norms of two ranks against one."""
    rows = written_rows(scene)
    alone = {
        (method, precision): measured(scene, tiny_words(rows, method, precision=precision), STEPS)
        for method, precision in sorted({(method, precision) for method, _, precision in CASES})
    }
    todo = {
        f"{method} {strategy} {precision}": Spec(
            tiny_words(rows, method, strategy=strategy, precision=precision, ranks=2), (RATE,), steps=STEPS
        )
        for method, strategy, precision in CASES
    }
    os.environ["NCCL_DEBUG"] = "WARN"
    crew = Crew(2, program="benchmarks.gpu.cells_apart", hung=HUNG_S if scene.cuda else scene.left_s / 2)
    journal, over = Journal(scene.folder / "journal.jsonl", "here"), threading.Event()
    teller = threading.Thread(target=_tell, args=(journal, alone, facts, over))
    teller.start()  # a group that hangs in its last cell must not take the others' numbers with it
    try:
        with facts.part("nine cells on two ranks"):
            run(crew, todo, journal)
    finally:
        over.set()
        teller.join()


def _tell(journal: Journal, alone: Mapping[tuple[str, str], Measured], facts: Facts, over: threading.Event) -> None:
    """Note what each cell gave as soon as it has."""
    told: set[str] = set()
    last = False
    while not last:
        last = over.wait(0.2)
        for name, cell in journal.read().items():
            if name not in told:
                told.add(name)
                _note(name, cell, alone, facts)


def _note(name: str, cell: Mapping[str, Any], alone: Mapping[tuple[str, str], Measured], facts: Facts) -> None:
    method, _, precision = name.split()
    one, exact = alone[method, precision], precision == "fp32"
    if wrong := cell.get("crashed") or cell.get("refused"):
        facts.note(name, str(wrong)[:200], ok=False, why="must run")
        return
    facts.near(f"{name}: losses", relative(cell["losses"], one.losses), EXACT if exact else ROUNDED)
    if exact:
        facts.near(f"{name}: gradient norms", relative(cell["norms"], one.norms), 1e-4)
