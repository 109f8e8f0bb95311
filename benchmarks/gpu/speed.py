"""Checks C1 to C3: tokens per second of dsft's own step on an 8B shape, its share of the ceiling, its peak against the
plan, and what the device is idle; QLoRA's decoding, and one step of a 70B shape. Weights are random, never zeros: a
product of zeros runs faster.
"""

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.batches import laid_out, ragged
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.scene import Scene, built, shape_of, shaped
from benchmarks.profiles import profiled
from dsft.config import Run
from dsft.engine.assemble import Session, skeleton
from dsft.engine.budget import estimate
from dsft.engine.parts import Part
from dsft.engine.precision import DTYPES
from dsft.engine.step import train_step
from dsft.models.work import widest, work
from dsft.objective import Batch
from dsft.packed import packed_weights
from dsft.telemetry.meter import peak_memory_bytes

WARM, TIMED = 3, 5
GIB = 2**30


@dataclass(frozen=True)
class Load:
    """A micro-batch that is a step. name: of it; tokens; whole: lengths of examples that are all supervised."""

    name: str
    tokens: int
    whole: tuple[int, ...] = ()

    def batch(self, vocabulary: int, seed: int) -> Batch:
        """Another one for each seed."""
        if self.whole:
            return laid_out(list(self.whole), vocabulary, 1.0, seed=seed)
        return ragged(self.tokens, vocabulary, seed=seed)


def loads(scene: Scene) -> list[Load]:
    """The first of which is the one that is profiled."""
    if not scene.cuda:
        return [Load("GSM8K lengths, 512 tokens", 512)]
    lengths = [Load(f"GSM8K lengths, {tokens} tokens", tokens) for tokens in (8192, 2048, 16384)]
    return [lengths[0], Load("2 x 4096, all supervised", 8192, (4096, 4096)), *lengths[1:]]


def lora(scene: Scene, facts: Facts) -> None:
    """C1."""
    _speed(scene, facts, "lora", loads(scene))


def qlora(scene: Scene, facts: Facts) -> None:
    """C2."""
    session = _speed(scene, facts, "qlora", loads(scene)[:2])
    if session is not None:
        with facts.part("decoding"):
            _decoding(scene, session, facts)
    del session
    scene.forget()
    with facts.part("one step of a 70B shape in 4 bits"):
        _large(scene, facts)


def compiled(scene: Scene, facts: Facts) -> None:
    """C3."""
    _speed(scene, facts, "lora", loads(scene)[:1], "train.compile=true")


def model_shape(scene: Scene) -> dict[str, Any]:
    """Llama 3.1 8B's, in the rehearsal the tiny model's."""
    return shape_of("llama8b" if scene.cuda else "tiny")


def ceiling(scene: Scene, session: Session) -> float:
    """FLOP per second of a plain product as wide as the widest linear, 8,192 rows (the rehearsal 512)."""
    wide_in, wide_out = widest(session.model, session.anatomy)
    rows, dtype = 8192 if scene.cuda else 512, DTYPES[session.run.train.precision]
    left, right = scene.normal(rows, wide_in, dtype=dtype), scene.normal(wide_in, wide_out, dtype=dtype, seed=1)
    return 2 * rows * wide_in * wide_out / scene.seconds(lambda: left @ right)


def _speed(scene: Scene, facts: Facts, method: str, todo: list[Load], *more: str) -> Session | None:
    """Assemble once, then every load; the session, for what comes after."""
    words = ("train.gradient_checkpointing=none", *(more or ("train.compile=false",)))
    run = shaped(scene, model_shape(scene), method, *words)
    planned = [_planned(run, load.tokens, accelerator=scene.cuda) for load in todo]
    free = torch.cuda.mem_get_info()[0] if scene.cuda else math.inf
    session = None
    with facts.part("assembling"):
        session = built(scene, run)
        scene.sync()
        most = ceiling(scene, session)
        facts.note("ceiling, a product as wide as the widest linear", round(most / 1e12, 3), "TFLOP/s")
    if session is None:
        return None
    for load, needed in zip(todo, planned, strict=True):
        facts.note(f"{load.name}: planned", round(needed / GIB, 2), "GiB")
        if needed > free:
            facts.note(load.name, f"not run: {free / GIB:.0f} GiB are there")
            continue
        with facts.part(load.name):
            _load(scene, facts, session, load, most)
        if load is todo[0] and not more:
            with facts.part("a profiled step"):
                _profiled(session, load, facts)
    return session


def _planned(run: Run, tokens: int, *, accelerator: bool) -> int:
    """Bytes of a rank by the plan, without what its process takes besides tensors.

    Before the run is assembled: another model on meta takes the compiler's attention from one that is compiled.
    """
    run = replace(run, train=replace(run.train, micro_batch_tokens=tokens))
    found = estimate(run, skeleton(run, run.model.resolve()), 1, accelerator=accelerator).as_dict()
    return int(found["total"] or 0) - int(found["process"] or 0)


def _load(scene: Scene, facts: Facts, session: Session, load: Load, most: float) -> None:
    vocabulary, seconds, tokens, supervised = session.model.config.vocab_size, [], 0, 0
    scene.forget()
    for step in range(1, WARM + TIMED + 1):
        batch = load.batch(vocabulary, step)
        scene.sync()
        begun = time.perf_counter()
        result = train_step(session, [batch], step, 1.0)
        scene.sync()
        seconds.append(time.perf_counter() - begun)
        if step > WARM:
            tokens, supervised = tokens + result.tokens, supervised + result.supervised
    timed, needed = sum(seconds[WARM:]), work(session.model, session.anatomy)
    facts.note(f"{load.name}: first step", round(seconds[0], 2), "s")
    facts.note(
        f"{load.name}: speed", round(tokens / timed), "tokens/s", ok=result.moved, why="loss and norm are finite"
    )
    facts.note(f"{load.name}: of the ceiling", round(needed.of(tokens, supervised) / timed / most, 3))
    facts.note(f"{load.name}: median step", round(statistics.median(seconds[WARM:]), 4), "s")
    if scene.cuda:
        facts.note(f"{load.name}: peak", round(peak_memory_bytes(scene.device) / GIB, 2), "GiB")


def _profiled(session: Session, load: Load, facts: Facts) -> None:
    def step(index: int) -> int:
        batch = load.batch(session.model.config.vocab_size, 100 + index)
        return train_step(session, [batch], 100 + index, 1.0).tokens

    found = profiled(session.model, session.anatomy, step, 1)["seconds"]
    whole = sum(found.values())
    told = {str(part): round(value / whole, 3) for part, value in found.items() if value > 0.002 * whole}
    facts.note("shares of a profiled step", told)
    facts.note("idle", round(found[Part.IDLE] / whole, 3))


def _decoding(scene: Scene, session: Session, facts: Facts) -> None:
    """Of the largest packed linear: read 4 bits and scales, write 16 bits a weight."""
    packed = [(one, module) for module in session.model.modules() for one in packed_weights(module).values()]
    weight, module = max(packed, key=lambda pair: math.prod(pair[0].shape))
    parts = tuple(module.get_parameter(name) for name in weight.parts)
    dtype = DTYPES[session.run.train.precision]
    took = scene.seconds(lambda: weight.unpack(parts, dtype), calls=20)
    weights = math.prod(weight.shape)
    moved = sum(part.nbytes for part in parts) + weights * dtype.itemsize
    facts.note(f"decoding {' x '.join(map(str, weight.shape))}", round(1e6 * took, 1), "us")
    facts.note("decoding, read and written", round(moved / took / 1e9, 1), "GB/s")


def _large(scene: Scene, facts: Facts) -> None:
    numbers = shape_of("llama70b" if scene.cuda else "tiny")
    load = Load("70B", 2048 if scene.cuda else 128)
    begun = time.perf_counter()
    session = built(scene, shaped(scene, numbers, "qlora", "train.gradient_checkpointing=full", "train.compile=false"))
    scene.sync()
    facts.note("70B: packed and assembled in", round(time.perf_counter() - begun, 1), "s")
    begun = time.perf_counter()
    result = train_step(session, [load.batch(session.model.config.vocab_size, 1)], 1, 1.0)
    facts.note("70B: one step", round(time.perf_counter() - begun, 2), "s", ok=result.moved)
    if scene.cuda:
        peak = peak_memory_bytes(scene.device) / GIB
        facts.note("70B: peak", round(peak, 1), "GiB", ok=peak < 48, why="a card of 48 GB")
