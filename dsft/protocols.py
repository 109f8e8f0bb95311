"""The contracts: what the engine may ask of a method, a quantizer and a tracker."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dsft.course import Course

if TYPE_CHECKING:
    from dsft.models.files import ModelFiles

ROLES = ("attention", "mlp", "shared_experts", "router", "other")
"""Roles of linears: inside a module named *attn*/*attention*, inside *mlp*/*feed_forward*/*expert*, elsewhere.

Beside fused experts, in the module that holds them: one with an output for each expert is their router, any other one
is of the experts that every token uses.
"""

STARTING = "init_from"
"""Key of methods that may start from an adapter."""

PREFIX = "dsft_prefix"
"""Name of a child of an attention module, and of an argument that travels with a call of the model to the attentions.

The child, called with the argument (None if there is none), gives keys and values (1, G, P, D) that each example sees
before its own.
"""


@dataclass(frozen=True)
class Anatomy:
    """Names into one model. blocks: the repeated layers in order; linears: nn.Linear in a block -> role.

    experts: modules that hold fused 3-D experts; tied: the head's weight is the embedding's.
    """

    blocks: tuple[str, ...]
    linears: dict[str, str]
    embedding: str
    head: str
    tied: bool
    experts: tuple[str, ...]


class Method(ABC):
    """What learns. A method is a frozen dataclass whose fields are its YAML keys."""

    @abstractmethod
    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Return the model (on meta) with this method in it; requires_grad says what learns."""

    def tokenize(self, model: nn.Module, tokenizer: Any) -> None:
        """Note in model which tokens the first values come from, for a method that starts from a text.

        model: with this method in it, on meta; tokenizer: the base's. Asked before weights load. Raises ValueError, one
        line, for a text that gives none.
        """

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """First value, in full and on CPU, of a parameter or buffer that attach added.

        name: its full name in model; param: the parameter, on meta; read(module_name) gives the (dequantized) weight
        (out, in) of a base linear, for methods whose start depends on it. torch's default generator is seeded by
        the caller from (seed, name), so the value does not depend on the number of ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} adds no parameter of its own, got {name}")

    def stored(self, model: nn.Module) -> Mapping[str, Tensor]:
        """What an earlier adapter gives this run to start from, by names in model: whole, on CPU, read when asked for.

        model: with this method in it, on meta. What is named goes before initial, and before the base's own value of a
        parameter that learns. Raises ValueError, one line, if the adapter does not fit. Empty: nothing of the kind.
        """
        return {}

    def started_from(self, place: str) -> "Method":
        """This method where it starts from the adapter in place. Raises ValueError if it cannot start from one."""
        if not any(field.name == STARTING for field in fields(self)):  # type: ignore[arg-type]
            raise ValueError(f"method.{STARTING} must be a key of {type(self).__name__} to take the values of {place}")
        return replace(self, **{STARTING: place})  # type: ignore[type-var]

    def rate(self, name: str, lr: float) -> float:
        """Rate of this parameter in a run of optim.lr=lr."""
        return lr

    def decays(self, name: str) -> bool:
        """False for a parameter that optim.weight_decay must leave as it is."""
        return True

    def kept(self, name: str) -> bool:
        """True for a frozen parameter that attach added and save needs."""
        return False

    def notes(self, model: nn.Module, anatomy: Anatomy) -> Iterable[str]:
        """What a person should know of where it went in model, which has this method in it; lines of the plan."""
        return ()

    def check(self, total: int) -> None:
        """Raise ValueError, one line, if this method cannot do with a run of total steps. Asked before weights load."""

    def course(self, model: nn.Module, total: int, device: torch.device) -> Course | None:
        """What it does around each step of a run of total steps; None: nothing.

        device: where its state is, but for what the host asks for at each step.
        model: with this method in it, on meta and not sharded yet.
        """
        return None

    @property
    def guides(self) -> bool:
        """True if it has a course, which asks for whole gradients, or adds to them, between backward and the move."""
        return type(self).course is not Method.course

    def save(self, model: nn.Module, weights: Mapping[str, Tensor], folder: Path, base: str) -> Mapping[str, Tensor]:
        """Write the result into folder: weights = trainable or kept name -> full CPU tensor; base = where the base is.

        Returns what is in its files, by the names that it has there.
        """
        raise NotImplementedError

    def merge(self, model: nn.Module) -> nn.Module:
        """The model with what it learned, as its family's own class builds it; the base's weights must not be packed.

        Exact up to rounding, on meta too. Raises ValueError, one line, where the maths or the family forbids it.
        """
        raise ValueError(
            f"--to must be adapter, as no weight of the base can hold what {type(self).__name__} adds, got merged; "
            "take --to adapter"
        )

    def finished(
        self, model: nn.Module, anatomy: Anatomy, name: str, value: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What a whole model holds of the parameter called name, and tensors to keep beside the model's files, by name.

        model: as trained, or merged; value: the parameter in fp32 or as it was loaded, whole, on CPU; dtype: that of
        train.precision, to which it will be rounded. Asked for each parameter of a whole result or a merged one.
        """
        return value, {}

    @property
    def beside(self) -> tuple[str, Mapping[str, str]]:
        """The beginning of the names of the files with what finished keeps beside the model, and what they say."""
        return "", {}

    def restored(self, model: nn.Module, anatomy: Anatomy, folder: Path) -> nn.Module:
        """The model that was trained, from model as the loader of the result's format gives it from folder.

        anatomy: of the base. For what such a loader does not know: another method has nothing to do here.
        """
        return model

    @property
    def whole(self) -> bool:
        """True if the result is a whole model (full, freeze) and not an adapter beside it."""
        return False

    @property
    def starts_as_base(self) -> bool:
        """True if the first values leave the base's logits as they are; a method that says False says why."""
        return True

    @property
    def noisy(self) -> bool:
        """True if what it adds to the model draws random numbers in training, as gates do; dropout aside."""
        return False

    @property
    def positions(self) -> int:
        """Positions that it takes before the first token of each example."""
        return 0


class Quantizer(ABC):
    """How frozen weights are packed."""

    @abstractmethod
    def convert(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Return the model (on meta), with what it packs, if anything, kept as bytes (see dsft.packed)."""

    def require(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Raise ValueError, one line, if less of a converted model is packed than its name promises; asked by runs."""

    @abstractmethod
    def report(self, model: nn.Module) -> str:
        """One line on what is packed in model and what stays in 16 bit; empty if there is nothing to say."""

    @property
    def packs_experts(self) -> bool:
        """True if it packs fused experts too."""
        return False


class BaseModel(Protocol):
    """Where the model that a run starts from is found. Its fields are its YAML keys."""

    def check(self, *, planning: bool = False) -> None:
        """Refuse what cannot be loaded, without torch or network; planning: its weights are not needed."""

    def resolve(self, *, planning: bool = False) -> "ModelFiles":
        """Find the model, downloading or writing it where it is not here. Raises ValueError if it cannot be found."""


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def check(self) -> None:
        """Raise ValueError, one line, if it cannot work here; cheap, nothing started."""

    def open(self, run_dir: Path, config: Mapping[str, Any], run_id: str | None) -> str | None:
        """Start; return the tracker's run id, or None if it has none."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values of one step."""

    def close(self) -> None:
        """Flush and end."""
