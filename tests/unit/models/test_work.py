"""What a step must compute, counted by hand on tiny shapes; and a ceiling that is one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsft.compose import compose
from dsft.engine.assemble import skeleton
from dsft.models.work import Work, matmul_ceiling, widest, work

HIDDEN, INNER, KEYS, VOCABULARY, BLOCKS = 128, 192, 64, 260, 3
LINEARS = BLOCKS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INNER)
HEAD = HIDDEN * VOCABULARY


def _work(*words: str) -> tuple[Work, Any]:
    run = compose(["model=tiny", "launcher=local", "train.precision=fp32", *words]).run
    bones = skeleton(run, run.model.resolve())
    return work(bones.model, bones.anatomy), bones


@pytest.mark.parametrize(
    ("words", "blocks", "head"),
    [
        (["method=full"], 6 * LINEARS, 6 * HEAD),
        (["method=lora"], 4 * LINEARS, 4 * HEAD),
        (["method=dora"], 4 * LINEARS, 4 * HEAD),
        (["method=qlora"], 4 * LINEARS, 4 * HEAD),
        (["method=lora", "quantization=int8"], 4 * LINEARS, 4 * HEAD),
        (["method=lora", "method.target_modules=[q_proj,lm_head]"], 4 * LINEARS, 4 * HEAD),
        (["method=freeze", "method.trainable=[1]"], 2 * LINEARS + 4 * LINEARS / BLOCKS, 4 * HEAD),
        (["method=freeze", "method.trainable=[head]"], 2 * LINEARS, 4 * HEAD),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_gradients_are_counted_where_they_are_needed(words: list[str], blocks: float, head: float) -> None:
    found, bones = _work(*words)
    assert found == Work(blocks, head)
    assert found.of(100, 60) == 100 * blocks + 60 * head
    assert widest(bones.model, bones.anatomy) in ((HIDDEN, INNER), (INNER, HIDDEN))


def test_a_token_uses_some_of_the_experts() -> None:
    run = compose(["model=tiny_moe", "launcher=local", "train.precision=fp32", "method=full"]).run
    files = run.model.resolve()
    bones = skeleton(run, files)
    config = files.config
    attention = sum(bones.model.get_submodule(name).weight.numel() for name in bones.anatomy.linears)
    experts = 3 * config.hidden_size * config.intermediate_size * config.num_experts_per_tok * config.num_hidden_layers
    assert config.num_experts_per_tok < config.num_local_experts
    assert work(bones.model, bones.anatomy).per_token == 6 * (attention + experts)


def test_the_ceiling_draws_from_no_stream_of_the_run() -> None:
    before = torch.get_rng_state()
    rate = matmul_ceiling(64, (128, 192), torch.float32, torch.device("cpu"), budget_s=0.02)
    assert rate > 1e6
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_unpacked_to_count_it(tmp_path: Path) -> None:
    _, bones = _work("method=qlora")
    for module in bones.model.modules():
        if hasattr(module, "decode"):
            module.decode = None  # whoever unpacks, calls it
    assert work(bones.model, bones.anatomy).per_token == 4 * LINEARS
