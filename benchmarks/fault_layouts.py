"""Layouts of the matrix of faults: a strategy on so many ranks, and what is trained there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TRAINED = "trained"
"""The cell of a layout that makes the run folder which the others damage."""

OTHER_FAMILY = "model.config.model_type=gpt2"
"""Learned positions, biases and Conv1D where the tiny Llama has none."""


@dataclass(frozen=True)
class Layout:
    """One. size: ranks; more: words besides; wrote: strategy and ranks that made the checkpoints, if others did."""

    name: str
    strategy: str
    size: int
    more: tuple[str, ...]
    wrote: tuple[str, int] | None = None

    @property
    def files(self) -> int:
        """Data files of a checkpoint."""
        return self.wrote[1] if self.wrote else self.size

    def words(self, rows: Path, *, writes: bool) -> list[str]:
        """What is composed; writes: by those who make the checkpoints."""
        strategy = self.wrote[0] if self.wrote and writes else self.strategy
        return [
            "model=tiny", *self.more, f"strategy={strategy}", "data=local", f"data.path={rows}", "tracker=[]",
            "train.precision=fp32", "train.steps=6", "train.global_batch_size=4", "train.max_length=512",
            "train.compile=false", "optim.lr=1e-3", "optim.schedule=constant", "checkpoint.verify_result=false",
        ]  # fmt: skip


LORA, FULL, OTHER = ("method=lora",), ("method=full",), (OTHER_FAMILY, "method=full")

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("single x1", "single", 1, LORA, ("fsdp", 2)),
        Layout("ddp x2", "ddp", 2, OTHER),
        Layout("fsdp x2", "fsdp", 2, LORA),
        Layout("fsdp x4", "fsdp", 4, OTHER),
        Layout("hsdp 2x2", "hsdp", 4, (*LORA, "strategy.shard_size=2")),
        Layout("zero1 x2", "zero1", 2, FULL),
        Layout("zero2 x2", "zero2", 2, LORA),
        Layout("zero3 x2", "zero3", 2, OTHER),
    )
}
