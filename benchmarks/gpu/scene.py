"""Where a check runs: its device, its folder, and runs of dsft on shapes whose weights are drawn there."""

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cells import Measured, measure
from benchmarks.groups import Crew, Job
from dsft.comm.world import World
from dsft.compose import compose
from dsft.config import Run
from dsft.engine import assemble as assembly
from dsft.engine.assemble import Session, assemble
from dsft.models.random_values import RandomValues

JOB = Job(**vars(Crew(1)), cells={}, journal="", code="", folder="", later=0.0)
"""What benchmarks.cells wants to know besides a run: nothing is counted, no group is played."""


@dataclass(frozen=True)
class Scene:
    """until: the clock (time.monotonic) when the check is killed."""

    device: torch.device
    folder: Path
    until: float

    @classmethod
    def here(cls, *, cpu: bool, seconds: float) -> "Scene":
        """Of this process; starts CUDA."""
        device = torch.device("cpu") if cpu else torch.device("cuda", 0)
        if not cpu:
            torch.cuda.set_device(device)
        return cls(device, Path(tempfile.mkdtemp(prefix="dsft-gpu-")), time.monotonic() + seconds)

    @property
    def cuda(self) -> bool:
        """Whether a GPU computes."""
        return self.device.type == "cuda"

    @property
    def world(self) -> World:
        """This process alone."""
        return World(0, 1, 0, self.device)

    @property
    def left_s(self) -> float:
        """Seconds until the check is killed."""
        return self.until - time.monotonic()

    def sync(self) -> None:
        """Wait for what the device does."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Give memory back, and let the peak be what is held now."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Random numbers drawn on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, dtype=dtype, device=self.device, generator=generator)

    def seconds(self, call: Callable[[], object], *, calls: int = 10) -> float:
        """Of one call, the mean of so many between two events after one that warms up."""
        call()
        self.sync()
        if not self.cuda:
            begun = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - begun) / calls
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(calls):
            call()
        last.record()
        self.sync()
        return float(first.elapsed_time(last)) / 1000 / calls


def measured(scene: Scene, words: Sequence[str], steps: int = 5) -> Measured:
    """Losses and norms of so many steps of one configuration on one process."""
    return measure(compose(words).run, scene.world, JOB, steps=steps)


def relative(found: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest relative difference of two equally long rows of numbers."""
    return max(abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True))


class DeviceValues(RandomValues):
    """Random values drawn where they will lie: one CPU thread takes a minute for a model of 8 billion parameters."""

    def fill(self, name: str, out: Tensor, start: int) -> None:
        """Write any values of the right spread: where they come from, only shapes, memory and speed are looked at."""
        if not out.is_cuda or out.ndim < 2:
            super().fill(name, out, start)
        else:
            generator = torch.Generator(out.device).manual_seed(hash((name, start)) % 2**31)
            out.normal_(0.0, self._std, generator=generator)


@contextmanager
def drawn_on_device() -> Iterator[None]:
    """Within, a model with model.init=random gets DeviceValues."""
    real = assembly.open_values

    def values(files: Any, dtype: torch.dtype, seed: int) -> DeviceValues:
        from dsft.models.build import build_meta

        assert files.init == "random"
        return DeviceValues(build_meta(files, dtype, attention="eager"), seed)

    assembly.open_values = values  # type: ignore[assignment]
    try:
        yield
    finally:
        assembly.open_values = real


def shaped(scene: Scene, numbers: dict[str, Any], method: str, *more: str) -> Run:
    """A run of a model of this shape, from a folder without weights. numbers: of its config.json."""
    from dsft.models.bytes_tokenizer import byte_tokenizer

    folder = scene.folder / "shape"
    if not folder.is_dir():
        folder.mkdir()
        byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(numbers))
    return compose([
        "model=custom", f"model.path={folder}", "model.init=random", f"method={method}", "data=reasoning_gym",
        "strategy=single", "launcher=local", "launcher.devices=1", "tracker=[]", "train.steps=10",
        f"train.precision={'bf16' if scene.cuda else 'fp32'}", *more,
    ]).run  # fmt: skip


def built(scene: Scene, run: Run) -> Session:
    """Its session, with random weights."""
    with drawn_on_device():
        return assemble(run, run.model.resolve(), scene.world)


def shape_of(name: str) -> dict[str, Any]:
    """The published numbers of an option of conf/model."""
    import yaml

    from dsft.wording import OWN_CONF

    numbers: dict[str, Any] = yaml.safe_load((OWN_CONF / "model" / f"{name}.yaml").read_text())["config"]
    return numbers


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))
