"""Tiny runs that several checks make: their rows and their overrides."""

from pathlib import Path

from benchmarks.gpu.scene import Scene
from benchmarks.matrix import Column, words
from benchmarks.matrix_rows import write_rows

ROWS = 8
"""Batches of eight rows: more than any check makes steps."""


def written_rows(scene: Scene) -> Path:
    """The rows that the equality matrix trains on."""
    path = scene.folder / "rows.jsonl"
    if not path.is_file():
        write_rows(path, ROWS)
    return path


def tiny_words(
    rows: Path, method: str, *extra: str, strategy: str = "single", precision: str = "fp32", rate: float = 1e-3,
    ranks: int = 1,
) -> tuple[str, ...]:  # fmt: skip
    """Overrides of a cell of the matrix on the tiny model, everything recomputed; precision: fp32 or bf16."""
    column = Column(f"{strategy} x{ranks}", strategy, ranks, None, extra)
    found = words(column, f"tiny {method} full", rows)
    assert "train.precision=fp32" in found
    exact = tuple(word.replace("train.precision=fp32", f"train.precision={precision}") for word in found)
    return (*exact, f"optim.lr={rate}", "train.compile=false")
