"""What keyed dropout costs: python -m benchmarks.dropping writes benchmarks/results/dropout.md, of this machine.

A step is timed in turns with masks of dsft and of torch's own dropout in the same session, by CPU time of one thread,
which other processes on the machine move less than the clock.
"""

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cells import ALONE
from benchmarks.matrix_rows import write_rows
from dsft.compose import compose
from dsft.data.open import open_data
from dsft.engine.assemble import assemble
from dsft.engine.dropout import Draws, Keyed
from dsft.engine.loop import step_batches
from dsft.engine.step import train_step
from dsft.objective import Batch

PAGE = Path(__file__).parent / "results" / "dropout.md"
SHAPES = ((2048, 576), (2048, 1536), (2048, 64), (300, 64))
ROUNDS = 9
WORDS = (
    "method=lora", "train.precision=fp32", "train.steps=100", "train.max_length=512", "train.compile=false",
    "tracker=[]", "data=local", "train.global_batch_size=8", "launcher=local",
)  # fmt: skip

MODELS = ("tiny", "smollm2_135m")
HEAD = """\
# What keyed dropout costs

CPU time of one thread in ms, medians of pairs that were timed in turns; the ratio is the median of theirs. The masks
of dropout 0.1 of dsft (made, applied, and applied in backward) beside those of `torch.nn.functional.dropout`, and a
whole training step with each: LoRA on all linears, fp32, 8 examples of 142 to 240 tokens.
`python -m benchmarks.dropping` on {cores} cores that other work used too, torch {torch}, commit {commit}.

| what | dsft, ms | torch, ms | ratio |
| --- | --- | --- | --- |
"""


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def paired(one: Callable[[], object], other: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float, float]:
    """Medians of both in seconds, and of one / other in each round; both run once before."""
    one(), other()
    rows = [(seconds(one), seconds(other)) for _ in range(rounds)]
    return tuple(statistics.median(column) for column in zip(*[(a, b, a / b) for a, b in rows], strict=True))  # type: ignore[return-value]


def masks(tokens: int, width: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """A mask of 0.1 made and applied, forward and backward, by dsft and by torch."""
    draws = Draws(0, 0, modules=True, functional=None)
    nothing = torch.zeros(tokens, dtype=torch.int64)
    draws.begin(1, Batch(nothing, nothing, nothing, (tokens,), ("a",), (0,), (1,)), torch.device("cpu"))
    x = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    above = torch.randn_like(x)
    return paired(
        lambda: draws.drop(x, 0.1, "module").backward(above), lambda: F.dropout(x, 0.1).backward(above), 4 * ROUNDS
    )


def steps(model: str, rows: Path) -> tuple[float, float, float]:
    """A training step with dropout, with keyed masks and with torch's."""
    run = compose([*WORDS, f"model={model}", f"data.path={rows}", "method.dropout=0.1"]).run
    files = run.model.resolve()
    data = open_data(run.data, files.tokenizer(), max_length=512, seed=0)
    session = assemble(run, files, ALONE)
    keyed = [module for module in session.model.modules() if isinstance(module, Keyed)]
    batches = step_batches(session, data, 1)[1]

    def step(kind: type[nn.Module]) -> None:
        for module in keyed:
            module.__class__ = kind
        session.draws.watched = True
        train_step(session, batches, 1, 1.0)

    return paired(lambda: step(Keyed), lambda: step(nn.Dropout), ROUNDS if model == "tiny" else 2)


def main() -> None:
    """Time all, and write the page."""
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    lines = [f"| {t} x {w}, {str(d).removeprefix('torch.')} | {_cells(masks(t, w, d))}"
             for t, w in SHAPES for d in (torch.float32, torch.bfloat16)]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, 2)
        lines += [f"| step of LoRA on {model}, dropout 0.1 | {_cells(steps(model, rows))}" for model in MODELS]
    PAGE.write_text(
        HEAD.format(commit=commit.strip(), torch=torch.__version__, cores=os.cpu_count()) + "\n".join(lines) + "\n"
    )
    print(PAGE.read_text())


def _cells(found: tuple[float, float, float]) -> str:
    one, other, ratio = found
    return f"{one * 1e3:.1f} | {other * 1e3:.1f} | {ratio:.2f} |"


if __name__ == "__main__":
    main()
