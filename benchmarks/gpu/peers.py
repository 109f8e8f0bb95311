"""Check D: what transformers + PEFT do with the same shape and the same examples on this machine, padded, and with
Liger's kernels where they are installed; beside dsft, whose speed C1 has on the same lengths.
"""

import importlib.util
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.gpu.batches import ragged
from benchmarks.gpu.facts import Facts
from benchmarks.gpu.scene import Scene, built, shaped
from benchmarks.gpu.speed import model_shape
from benchmarks.job import RANK
from benchmarks.plain import LINEARS, padded
from dsft.engine.step import train_step
from dsft.objective import Batch

WARM, TIMED, RATE = 2, 4, 2e-4
TOKENS = {True: 4096, False: 512}
"""Real ones of a step; padded to the longest of some twenty examples they are twice as many."""


def peers(scene: Scene, facts: Facts) -> None:
    """Tokens per second of each; the ratio."""
    found: dict[str, float] = {}
    with facts.part("dsft"):
        found["dsft"] = _ours(scene)
    scene.forget()
    for name in ("padded", "padded, Liger"):
        if "Liger" in name and not (scene.cuda and importlib.util.find_spec("liger_kernel")):
            facts.note(name, "not possible: no GPU, or liger-kernel is not installed")
            continue
        with facts.part(name):
            found[name] = _theirs(scene, liger="Liger" in name)
        scene.forget()
    for name, speed in found.items():
        facts.note(f"{name}: speed", round(speed), "real tokens/s", ok=speed > 0)
        if name != "dsft" and "dsft" in found:
            facts.note(f"dsft / {name}", round(found["dsft"] / speed, 2))


def _ours(scene: Scene) -> float:
    run = shaped(scene, model_shape(scene), "lora", "train.gradient_checkpointing=none", "train.compile=false")
    session = built(scene, run)
    return _timed(scene, session.model.config.vocab_size, lambda batch: train_step(session, [batch], 1, 1.0))


def _theirs(scene: Scene, *, liger: bool) -> float:
    model = _model(scene)
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model.get_base_model())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)

    def step(batch: Batch) -> None:
        given = {name: value.to(scene.device) for name, value in padded(_rows(batch)).items()}
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _timed(scene, model.config.vocab_size, step)


def _model(scene: Scene) -> Any:
    from dsft.models.numbers import config_of

    dtype = torch.bfloat16 if scene.cuda else torch.float32
    torch.manual_seed(0)
    with scene.device:
        model = AutoModelForCausalLM.from_config(config_of(model_shape(scene)), dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS, task_type="CAUSAL_LM")
    return get_peft_model(model, adapter).train()


def _rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each example; labels are not shifted there."""
    pairs = zip(batch.tokens.split(batch.lengths), batch.targets.split(batch.lengths), strict=True)
    return [(tokens.tolist(), [-100, *targets[:-1].tolist()]) for tokens, targets in pairs]


def _timed(scene: Scene, vocabulary: int, step: Any) -> float:
    """Real tokens per second after the first steps."""
    for turn in range(WARM + TIMED):
        if turn == WARM:
            scene.sync()
            begun = time.perf_counter()
        step(ragged(TOKENS[scene.cuda], vocabulary, seed=turn))
    scene.sync()
    return TIMED * TOKENS[scene.cuda] / (time.perf_counter() - begun)
