"""The contract of a strategy: where parameters, gradients and optimizer state live."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsft.comm.world import World
from dsft.course import KEPT
from dsft.protocols import Anatomy

OptimizerFactory = Callable[[Sequence[dict[str, Any]]], torch.optim.Optimizer]
"""Parameter groups -> optimizer."""

Shape = tuple[torch.Size, torch.dtype]
"""Of a saved tensor as a whole, whatever the ranks hold of it."""


@dataclass(frozen=True)
class Shares:
    """Parts of a whole that one rank keeps between steps, 1 = all of it (2: it is there twice).

    weights: of what is frozen, as it is stored; values, gradients, moments: of what learns, in fp32; shown: of what
    learns, without masters that lie beside it. on_host: those of them that live in host memory where there is an
    accelerator.
    """

    weights: float
    values: float
    gradients: float
    moments: float
    shown: float
    on_host: tuple[str, ...] = ()


class Strategy(ABC):
    """Where parameters, gradients and optimizer state live. One instance per run: it holds the run's optimizer.

    A dataclass whose init fields are its YAML keys.

    Order of calls: shard (model on meta) -> place(module) for each module once its own parameters hold values
    -> prepare -> per step: backward (once per micro-batch) -> step or drop. For a method's course (every rank alike):
    values, gradients, add_gradients after the last backward and before step; values, write between steps.
    For roles: snapshot and showing, between steps.
    """

    reentrant_recompute = False
    """True if gradient checkpointing must be reentrant under this strategy."""

    shards_blocks = False
    """True if each block is sharded by itself, so that no two may share a parameter."""

    grades_each_call = False
    """True if a block may not be called without a gradient inside of a forward pass that has one."""

    kept: Mapping[str, Tensor] = {}
    """Tensors of a method's course that are saved with the run; see keep."""

    @abstractmethod
    def data_ranks(self, world: World) -> int:
        """Number of ranks that see different examples."""

    @abstractmethod
    def shares(self, size: int) -> Shares:
        """What one of size ranks keeps. Asked before anything is started, by the plan."""

    def excess(self, shape: Sequence[int], size: int, *, movable: bool) -> float:
        """How many times its share the fullest of size ranks holds of a tensor of this shape; 1: they are even."""
        return 1.0

    def gathered(self, blocks: Sequence[int], rest: int) -> int:
        """Bytes that are whole at a time in a step, beside the shares; blocks, rest: of each block and of all else."""
        return 0

    @abstractmethod
    def shard(self, model: nn.Module, anatomy: Anatomy, world: World, precision: str) -> nn.Module:
        """Lay the model (on meta) out over the ranks."""

    def home(self, world: World) -> torch.device:
        """Where this rank's parameters live between uses."""
        return world.device

    def place(self, module: nn.Module) -> None:
        """The module's own parameters now hold their values, in full: keep this rank's part (ZeRO-3)."""

    @abstractmethod
    def prepare(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], make_optimizer: OptimizerFactory
    ) -> nn.Module:
        """Build the optimizer; return the module to call forward on."""

    def release(self, lr_scale: float) -> None:
        """The next backward is the step's last: it moves each parameter once its gradient is whole, and frees that.

        step then gives the norm. What optim.in_backward asks for; rules.py says which strategies can.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot move parameters in backward")

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of loss (this rank's share of the global mean loss: ranks are SUMMED, not averaged).

        last: this is the step's last micro-batch; gradients must be whole afterwards.
        """

    @abstractmethod
    def step(self, max_norm: float, lr_scale: float) -> float:
        """Clip by the global norm, set each group's rate to its lr * lr_scale, move. Returns the norm before clipping.

        If the norm is not finite (on any rank), nothing moves, gradients are dropped and the norm is returned as it is.
        """

    @abstractmethod
    def drop(self) -> None:
        """Forget the accumulated gradients; move nothing."""

    def rest(self) -> None:
        """Lay parameters out as between steps, whatever forward pass came last: before reading them off the model."""

    @abstractmethod
    def full(self, param: nn.Parameter) -> Tensor:
        """The whole parameter on CPU (fp32 master value where one exists). Collective: every rank must call it."""

    def used(self, model: nn.Module, path: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Frozen parameters of model's module at path, whole and on CPU, as its forward pass gets them. Collective.

        names: those of the module's own that are asked for. Where forward gathers in another way than full, that way.
        """
        module = model.get_submodule(path)
        return {name: self.full(module.get_parameter(name)) for name in names}

    def keep(self, state: Mapping[str, Tensor]) -> None:
        """Save these tensors (the same on every rank) with the run, and give them their saved values in place."""
        object.__setattr__(self, "kept", {f"{KEPT}{name}": value for name, value in state.items()})

    @abstractmethod
    def values(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """Whole fp32 values, not to be changed: they may be the parameters themselves."""

    @abstractmethod
    def gradients(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """Copies of whole gradients, summed over the ranks, before clipping."""

    @abstractmethod
    def add_gradients(self, params: Sequence[nn.Parameter], more: Sequence[Tensor]) -> None:
        """Add whole tensors, the same on every rank, to gradients that have been summed over the ranks."""

    @abstractmethod
    def write(self, params: Sequence[nn.Parameter], new: Sequence[Tensor]) -> None:
        """Replace values, the optimizer's fp32 ones too; its moments stay."""

    @abstractmethod
    def parts(self) -> list[Tensor]:
        """What this rank holds of each parameter that learns, as forward passes use it; live, in a fixed order."""

    def snapshot(self) -> list[Tensor]:
        """A copy of parts as they are now. No collective."""
        self.rest()
        return [part.detach().clone() for part in self.parts()]

    @contextmanager
    def showing(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Within it, forward passes see these values (of snapshot) in place of parts, which are back afterwards.

        For passes without a gradient, between steps. The two change places, so that no third copy is made.
        """
        self.rest()
        _swap(self.parts(), values)
        try:
            yield
        finally:
            self.rest()
            _swap(self.parts(), values)

    def keepsakes(self, saved: Mapping[str, object]) -> dict[str, Tensor]:
        """Tensors like the kept ones, to be filled with what was saved; RuntimeError if that is something else."""
        there = {name for name in saved if name.startswith(KEPT)}
        if there != self.kept.keys():
            raise RuntimeError(f"the checkpoint and this run differ in {sorted(there ^ self.kept.keys())[0]}")
        return {name: torch.empty_like(value) for name, value in self.kept.items()}

    def take_keepsakes(self, state: Mapping[str, Tensor]) -> None:
        """Give the kept tensors the values in state, in place."""
        for name, value in self.kept.items():
            value.copy_(state[name])

    @abstractmethod
    def export_state(self) -> dict[str, Tensor]:
        """What learns and the optimizer's state, under names and shapes that hold no rank. Collective.

        "param/NAME" (fp32), "method/NAME" (what is kept) and "KEY/NAME" ("exp_avg/NAME", ...): DTensors, tensors that
        every rank has alike, or whole tensors that only this rank gives. "KEY": (P,) the optimizer's numbers, one per
        parameter in order.
        They may be live: use them before the next step. A state says the same under every strategy.
        """

    @abstractmethod
    def state_template(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Fresh tensors on this rank to fill with a saved state of these shapes; filled or not, they change nothing."""

    @abstractmethod
    def import_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a template that has been filled. Collective."""

    def close(self) -> None:
        """Free what prepare built, so that another run can follow in this process."""


@torch.no_grad()
def _swap(parts: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Exchange the values of each two tensors, one pair at a time."""
    for part, other in zip(parts, others, strict=True):
        aside = part.clone()
        part.copy_(other)
        other.copy_(aside)
