"""Check A5: are the same steps the same twice, does a resumed run go on as the unbroken one, and what does a save in
the background cost; with the fastest kernels and with those that torch calls deterministic.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.batches import ragged
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.scene import Scene, built, shape_of, shaped
from dsft.checkpoint.lease import acquire
from dsft.checkpoint.manifest import Identity
from dsft.checkpoint.restore import Search, restore
from dsft.checkpoint.saver import Retention, Saver
from dsft.checkpoint.store import Store
from dsft.engine.assemble import Session
from dsft.engine.step import train_step

SAVED, TOTAL = 3, 6
"""Steps before the save, and in all."""
WHO, PROGRESS = Identity("gpu", "config", "base", "data"), {"optimizer": "adamw"}
TOKENS = {True: 4096, False: 256}
"""Of a step, with a GPU and without: atomics need work on several processors to differ."""


@dataclass
class Made:
    """Loss and norm of each step, and what learned at the end."""

    numbers: list[tuple[float, float]] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)


def again(scene: Scene, facts: Facts) -> None:
    """Of the fastest kernels no equality is asked on a GPU, as flash attention's backward adds in any order there."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts, which no step has done yet
    for mode in ("fastest", "deterministic"):
        with facts.part(mode):
            must = mode == "deterministic" or not scene.cuda
            first, saved = _unbroken(scene, scene.folder / mode, facts, mode)
            second, _ = _unbroken(scene, scene.folder / f"{mode}-twice", facts, mode)
            _told(f"{mode}: the same steps twice", first, second, facts, must=must)
            resumed = _resumed(scene, saved, mode)
            first.numbers = first.numbers[SAVED:]
            _told(f"{mode}: resumed against unbroken", first, resumed, facts, must=must)


def _session(scene: Scene, mode: str) -> Session:
    numbers: dict[str, Any] = shape_of("tiny")
    if scene.cuda:
        numbers |= {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    session = built(scene, shaped(scene, numbers, "lora", "optim.lr=1e-3", "train.gradient_checkpointing=none"))
    torch.use_deterministic_algorithms(mode == "deterministic")
    return session


def _step(session: Session, step: int, settle: Any = lambda: None) -> tuple[float, float]:
    cuda = session.world.device.type == "cuda"
    vocabulary = session.model.config.vocab_size
    batch = ragged(TOKENS[cuda], vocabulary, seed=step)
    result = train_step(session, [batch], step, 1.0, settle=settle)
    return result.loss, result.grad_norm


def _unbroken(scene: Scene, folder: Path, facts: Facts, mode: str) -> tuple[Made, Store]:
    """All steps; the state after SAVED is written while the next step computes."""
    session, made = _session(scene, mode), Made()
    store = Store(folder)
    lease, _ = acquire(store.folder)
    saver = Saver(store, lease, WHO, session.world, Retention(1, 0))
    for step in range(1, TOTAL + 1):
        made.numbers.append(_step(session, step, saver.settle))
        if step == SAVED:
            saver.start(step, session.run.strategy.export_state, PROGRESS, background=True)
    outcome = saver.take()
    assert outcome is not None
    facts.note(f"{mode}: save in the background", outcome.error or "written", ok=outcome.error is None)
    facts.note(f"{mode}: the step waited for it", round(1000 * outcome.stall_s, 2), "ms")
    lease.release()
    made.values = {name: value.cpu().clone() for name, value in session.run.strategy.export_state().items()}
    return made, store


def _resumed(scene: Scene, store: Store, mode: str) -> Made:
    session, made = _session(scene, mode), Made()
    lease, _ = acquire(store.folder)
    search = Search(store, lease, WHO, "adamw", session.world, lambda *_: None)
    content = restore(session.run.strategy, search)
    assert content is not None
    assert content.step == SAVED
    made.numbers = [_step(session, step) for step in range(SAVED + 1, TOTAL + 1)]
    lease.release()
    made.values = {name: value.cpu().clone() for name, value in session.run.strategy.export_state().items()}
    return made


def _told(what: str, one: Made, other: Made, facts: Facts, *, must: bool) -> None:
    steps = sum(mine != theirs for mine, theirs in zip(one.numbers, other.numbers, strict=True))
    other_names = one.values.keys() ^ other.values.keys()
    tensors = sum(
        not torch.equal(value, other.values[name]) for name, value in one.values.items() if name in other.values
    )
    same = steps == 0 and tensors == 0 and not other_names
    said = "bit-equal" if same else f"{steps} steps and {tensors} tensors of {len(one.values)} differ"
    facts.note(what, said, ok=same if must else None, why="must be bit-equal")
