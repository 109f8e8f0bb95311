"""Diff pruning: a sparse difference to the base, whose places learn as well as its values."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dsft.course import Course
from dsft.methods.hard_concrete import DIFF, GATE, GROUP, Gated, Gates, Noise, fold, gate
from dsft.methods.native import Native
from dsft.methods.pruner import Entries, Pruner
from dsft.methods.stored import NATIVE as CONFIG
from dsft.methods.stored import TENSORS
from dsft.protocols import Anatomy

PARTS = ("indices", "values", "shape")
LAYOUT = (
    "NAME.indices: positions in the base's tensor NAME, flattened by rows; NAME.values: fp32, what is added there, the "
    "sum made in fp32 and rounded once to the base's type; NAME.shape: of NAME. No other number of the base changes."
)


@dataclass(frozen=True, kw_only=True)
class DiffPruning(Native):
    """theta = theta0 + z w, w from 0, z = cut(sigmoid(logit(u) + alpha) (upper - lower) + lower) to [0, 1].

    Parameters: 2 per number of the base that is targeted (w and alpha), and one per tensor if structured. Per step one
    u for each gate, the same in all micro-batches, ranks and recomputation; evaluation takes u = 1/2. The loss gets
    penalty x the expected number of open gates. When the last final steps begin, the density x N largest |z w| of all N
    are kept, exactly so many, of equal ones the first; their places are fixed and their w goes on from z w.
    target: blocks (all tensors in the blocks), or all (embedding, head and last norm too).
    The paper's code clips w and alpha apart, prunes by gates with noise, and starts the optimizer and its schedule anew
    for the last steps; here one norm, no noise and one schedule.
    Source: Guo, Rush, Kim 2021, arXiv:2012.07463; code: dguo98/DiffPruning.
    """

    density: float
    final: int | float
    penalty: float
    structured: bool
    target: Literal["blocks", "all"]
    gate_start: float
    lower: float
    upper: float
    gate_lr: float
    seed: int

    @property
    def noisy(self) -> bool:
        """True: gates are drawn in training."""
        return True

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _need(0 < self.density <= 1, "density", "be in (0, 1]", self.density)
        fits = self.final >= 1 if isinstance(self.final, int) else 0 < self.final < 1
        _need(fits, "final", "be a number of steps, or a share of the run's in (0, 1)", self.final)
        _need(self.penalty >= 0, "penalty", "be 0 or more", self.penalty)
        _need(self.target in ("blocks", "all"), "target", "be blocks or all", self.target)
        _need(math.isfinite(self.gate_start), "gate_start", "be a finite number", self.gate_start)
        _need(self.lower < 0, "lower", "be below 0, so that a gate can be closed", self.lower)
        _need(self.upper > 1, "upper", "be above 1, so that a gate can be open", self.upper)
        _need(self.gate_lr > 0, "gate_lr", "be above 0", self.gate_lr)
        if self.init_from is not None:
            raise ValueError(
                f"method.init_from must be null with diff_pruning, which learns a difference to its own base, got "
                f"{self.init_from}; export that run --to merged and give the folder as model.path"
            )

    def check(self, total: int) -> None:
        """Refuse a run without a step before the pruning, or without one after it."""
        self._last(total)

    def _last(self, total: int) -> int:
        """The step after which entries are chosen."""
        final = int(self.final * total) if isinstance(self.final, float) else self.final
        if not 1 <= final < total:
            raise ValueError(
                f"train.steps must leave steps before method.final ({final}), and method.final one at least, got "
                f"{total}; raise train.steps or change method.final"
            )
        return total - final

    def add(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Put w and gates beside each tensor that is targeted."""
        noise = Noise(seed=self.seed, step=0, quiet=False)
        shared: dict[int, tuple[str, dict[str, nn.Parameter]]] = {}
        blocks = tuple(f"{block}." for block in anatomy.blocks)
        for place, module in list(model.named_modules()):
            own = {name: param for name, param in module._parameters.items() if param is not None}
            found = {}
            for name, param in own.items():
                full = f"{place}.{name}" if place else name
                if self.target == "all" or full.startswith(blocks):
                    found[name] = shared.setdefault(id(param), (full, self._beside(param)))
            if found:
                gate(module, found, noise, (self.lower, self.upper))

    def _beside(self, param: nn.Parameter) -> dict[str, nn.Parameter]:
        """What learns of one tensor, without values yet."""
        shapes = {DIFF: param.shape, GATE: param.shape} | ({GROUP: torch.Size([1])} if self.structured else {})
        return {ending: nn.Parameter(torch.zeros(shape, device=param.device)) for ending, shape in shapes.items()}

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """Zeros for w, gate_start for gates."""
        return torch.full(param.shape, 0.0 if name.endswith(DIFF) else self.gate_start, dtype=torch.float32)

    def rate(self, name: str, lr: float) -> float:
        """Gates have a rate of their own."""
        return lr if name.endswith(DIFF) else self.gate_lr

    def decays(self, name: str) -> bool:
        """Gates do not: 0 is half open."""
        return name.endswith(DIFF)

    def course(self, model: nn.Module, total: int, device: torch.device) -> Course:
        """The penalty and the pruning."""
        learning = {name: param.numel() for name, param in model.named_parameters() if param.requires_grad}
        tensors = [
            Entries(name, gates, group if group in learning else None, size)
            for name, size in learning.items() if name.endswith(DIFF)
            for gates, group in [(_beside(name, GATE), _beside(name, GROUP))]
        ]  # fmt: skip
        count = int(self.density * sum(entries.size for entries in tensors))
        _need(count > 0, "density", "leave an entry", self.density, "raise it")
        noise = next(module.noise for module in model.modules() if isinstance(module, Gated))
        return Pruner(
            tensors, noise, (self.lower, self.upper), device,
            weight=self.penalty, count=count, last=self._last(total),
        )  # fmt: skip

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
        """Write indices, values and shape of each tensor that differs from the base.

        Raises RuntimeError if more differ than density allows: the steps that should have pruned moved nothing.
        """
        tensors: dict[str, Tensor] = {}
        total = differing = 0
        for name, diff in weights.items():
            if name.endswith(DIFF):
                gates = Gates(self.lower, self.upper, None)
                change = gates.whole(weights[_beside(name, GATE)], weights.get(_beside(name, GROUP))) * diff
                parts = _sparse(change)
                total, differing = total + diff.numel(), differing + len(parts[0])
                if len(parts[0]):
                    owner = name.removesuffix(DIFF)
                    tensors |= {f"{owner}.{part}": value for part, value in zip(PARTS, parts, strict=True)}
        if differing > int(self.density * total):
            raise RuntimeError(
                f"{differing} of {total} numbers differ from the base, more than method.density={self.density}: every "
                "step after the gates had learned met a NaN or Inf, so that nothing was pruned"
            )
        written = super().save(model, tensors, folder, base)
        said = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**said, "tensors": LAYOUT}, indent=1) + "\n")
        return written

    def restore(self, model: nn.Module, anatomy: Anatomy, folder: Path) -> nn.Module:
        """Add the differences in folder to copies of model's weights, whose memory others may share; no gate is left.

        Raises ValueError if folder is of another base.
        """
        from safetensors.torch import load_file

        stored = load_file(folder / TENSORS)
        tensors = {name.removesuffix(".shape"): value for name, value in stored.items() if name.endswith(".shape")}
        held = dict(model.named_parameters(remove_duplicate=False))
        for name, shape in tensors.items():
            found = tuple(held[name].shape) if name in held else None
            if found != tuple(shape.tolist()):
                raise ValueError(
                    f"{folder} must hold differences to this base, got {name} of {tuple(shape.tolist())} in place of "
                    f"{found or 'none'}; load it on its own base, see {CONFIG}"
                )
        with torch.no_grad():
            for name in tensors:
                flat = held[name].detach().flatten().clone()
                where = stored[f"{name}.indices"].to(flat.device, torch.int64)
                flat[where] = (flat[where].float() + stored[f"{name}.values"].to(flat.device)).to(flat.dtype)
                held[name].data = flat.view(held[name].shape)
        return model

    def merge(self, model: nn.Module) -> nn.Module:
        """What is read back is merged already; on a model with gates, theta0 + z w without noise."""
        fold(model)
        return model


def _beside(name: str, ending: str) -> str:
    """Name of what learns beside the w of this name."""
    return f"{name.removesuffix(DIFF)}{ending}"


def _sparse(change: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where it is not 0, what it is there, and its shape. Positions are int32 where that is enough."""
    flat = change.flatten()
    where = flat.nonzero()[:, 0]
    kind = torch.int32 if len(flat) < 2**31 else torch.int64
    return where.to(kind), flat[where], torch.tensor(change.shape)


def _need(fits: bool, key: str, rule: str, value: object, way_out: str = "") -> None:
    if not fits:
        raise ValueError(f"method.{key} must {rule}, got {value}{f'; {way_out}' if way_out else ''}")
