"""train.compile: blocks through torch's compiler, one program for all of a kind and for any length.

Compiled is what a block computes in training; attention between its two halves, evaluation and generation are not.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsft.cache.root import make, own_root
from dsft.config import Train
from dsft.models.attention import NAME, ragged_attention
from dsft.models.routing import routes
from dsft.packed import packed_weights
from dsft.protocols import Anatomy

LONG = 1000
"""Steps from which auto compiles: it takes about a minute and gains some percent, benchmarks/results/speed-lora.md."""

BACKEND, CACHE = "inductor", "TORCHINDUCTOR_CACHE_DIR"

Forward = Callable[..., Any]


class Lengths:
    """Lengths of the examples in a row that the compiler does not look into, else each tuple had its own program."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths


class Compiler:
    """Compiles forward functions as they are called, and tells when it did."""

    def __init__(self) -> None:
        import torch._dynamo
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir
        from transformers import AttentionInterface

        if os.environ.get(CACHE) in (None, default_cache_dir()):  # importing torch's compiler may have set it to that
            make(own_root())
            os.environ[CACHE] = str(own_root() / "compiled")  # programs: never shared
        torch._dynamo.reset()  # programs of a run before in this process
        AttentionInterface.register(NAME, torch.compiler.disable(_attention))
        self.programs: dict[Forward, Forward] = {}
        self.told = self._counted()

    def __call__(self, forward: "partial[Any]", *args: Any) -> Any:
        """What forward(*args) gives; forward: a block's own function with the block and keywords bound."""
        if forward.func not in self.programs:
            self.programs[forward.func] = torch.compile(forward.func, dynamic=True, backend=BACKEND)
        keywords = {**forward.keywords, "segment_lengths": Lengths(forward.keywords["segment_lengths"])}
        return self.programs[forward.func](*forward.args, *args, **keywords)

    def news(self) -> Mapping[str, float] | None:
        """Graphs and seconds since this was asked last; None if nothing was compiled."""
        before, self.told = self.told, self._counted()
        graphs, seconds = self.told[0] - before[0], self.told[1] - before[1]
        return {"graphs": graphs, "seconds": seconds} if graphs else None

    def _counted(self) -> tuple[int, float]:
        from torch._dynamo.utils import calculate_time_spent, counters

        return counters["stats"]["unique_graphs"], calculate_time_spent()["total_wall_time"]


def _attention(
    *args: Any, segment_lengths: Lengths | tuple[int, ...] | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    lengths = segment_lengths.lengths if isinstance(segment_lengths, Lengths) else segment_lengths
    return ragged_attention(*args, segment_lengths=lengths, **kwargs)


def compiler_for(train: Train, total: int, model: nn.Module, anatomy: Anatomy) -> Compiler | None:
    """None to leave the blocks as they are.

    Of auto, steps, model and train.gradient_checkpointing alone decide, so that a resumed run decides alike. A module
    with packed weights is never compiled, nor one that says so (never_compiled); what is between them is, in small
    pieces, if it is asked for.
    """
    wanted = train.compile
    eager = [m for m in model.modules() if packed_weights(m) or hasattr(m, "never_compiled")]
    if wanted == "auto":
        able = all(hasattr(model.get_submodule(name), "gradient_checkpointing") for name in anatomy.blocks)
        once = train.gradient_checkpointing == "none" or not routes(anatomy)  # else a program chooses experts anew
        wanted = total >= LONG and able and once and not eager
    if not wanted:
        return None
    for module in eager:
        module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    return Compiler()
