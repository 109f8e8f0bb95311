"""train.compile: the same numbers, one program for all lengths, and nothing compiled that was not asked for."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.matrix_rows import write_rows
from dsft.comm.world import World
from dsft.compose import compose
from dsft.data.open import open_data
from dsft.engine import compiling
from dsft.engine.assemble import assemble, skeleton
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step

BOUND = 1e-5

pytestmark = [
    # torch's tracer looks at it where a graph ends in a block
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # torch's own compiler imports what still uses it
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "rows.jsonl"
    write_rows(path, 6)
    yield path
    torch._dynamo.reset()


def steps_of(rows: Path, *words: str, steps: int = 3) -> tuple[list[tuple[float, float]], list[int]]:
    """(loss, gradient norm) of each step, and the graphs that each compiled; micro-batches hold 1 to 3 examples."""
    settings = [
        "model=tiny", "data=local", f"data.path={rows}", "train.precision=fp32", "train.max_length=512", "tracker=[]",
        "launcher=local", "train.micro_batch_tokens=500", "train.global_batch_size=8",
    ]  # fmt: skip
    run = compose([*settings, *words]).run
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=512, seed=0)
    session = assemble(run, files, World(0, 1, 0, torch.device("cpu")))
    found, graphs = [], []
    for step in range(1, steps + 1):
        result = train_step(session, step_batches(session, data, step)[1], step, 1.0)
        found.append((result.loss, result.grad_norm))
        news = session.compiler.news() if session.compiler else None
        graphs.append(int(news["graphs"]) if news else 0)
    return found, graphs


def compare(rows: Path, *words: str) -> None:
    plain, none = steps_of(rows, *words, "train.compile=false")
    compiled, graphs = steps_of(rows, *words, "train.compile=true")
    assert not any(none)
    assert graphs[0] > 0
    assert not any(graphs[1:]), f"compiled again at later steps: {graphs}"
    for mine, theirs in zip(compiled, plain, strict=True):
        assert mine == pytest.approx(theirs, rel=BOUND)


def test_traced_blocks_compute_what_plain_ones_do(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")  # all but the making of machine code
    compare(rows, "method=lora", "train.gradient_checkpointing=selective")


@pytest.mark.slow
@pytest.mark.parametrize("words", [("method=lora",), ("method=full", "train.gradient_checkpointing=full"),
                                   ("method=dora",), ("method=qlora",), ("method=lora", "model=tiny_moe"),
                                   ("method=prefix", "train.gradient_checkpointing=full")])  # fmt: skip
def test_compiled_blocks_compute_what_plain_ones_do(words: tuple[str, ...], rows: Path) -> None:
    compare(rows, *words)


def test_auto_compiles_long_runs_of_what_can_be_compiled() -> None:
    composed = compose(["model=tiny", "launcher=local", "tracker=[]", "train.epochs=1"])
    assert composed.run.train.compile == "auto"
    for words, total, expected in (
        ((), compiling.LONG, True),
        ((), compiling.LONG - 1, False),
        (("method=qlora",), compiling.LONG, False),
        (("model=tiny_moe",), compiling.LONG, True),
        (("model=tiny_moe", "train.gradient_checkpointing=full"), compiling.LONG, False),
    ):
        run = compose(["model=tiny", "launcher=local", "tracker=[]", *words]).run
        bones = skeleton(run, run.model.resolve())
        assert (compiling.compiler_for(run.train, total, bones.model, bones.anatomy) is not None) == expected
    torch._dynamo.reset()


def test_a_program_does_not_choose_experts_twice() -> None:
    run = compose(["model=tiny_moe", "tracker=[]", "train.compile=true", "train.gradient_checkpointing=selective"]).run
    with pytest.raises(ValueError, match=r"selective on Mixtral.*: a program would choose experts anew"):
        skeleton(run, run.model.resolve())


def test_without_a_compiler_auto_is_false_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "clang++").symlink_to("/bin/true")  # torch takes it only where CXX names it
    composed = compose(["model=tiny", "launcher=local", "tracker=[]"])
    assert composed.run.train.compile is False
    assert "train.compile=auto: false, a C++ compiler (g++, or another that CXX names) is not there" in composed.repairs
    with pytest.raises(ValueError, match=r"train.compile=true needs a C\+\+ compiler"):
        compose(["model=tiny", "launcher=local", "tracker=[]", "train.compile=true"])
    monkeypatch.setenv("CXX", "clang++")
    assert compose(["model=tiny", "launcher=local", "tracker=[]", "train.compile=true"]).run.train.compile is True


def test_a_compiled_block_has_no_parts_to_profile() -> None:
    with pytest.raises(ValueError, match="makes one program of them"):
        compose(
            ["model=tiny", "launcher=local", "tracker=[]", "train.compile=true", "train.profile=2", "train.steps=5"]
        )
