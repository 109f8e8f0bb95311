"""The base model's values by the model's own names: from a checkpoint, converted where its names differ, or random."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dsft.models.build import build_meta
from dsft.models.checkpoint_values import CheckpointValues
from dsft.models.heads import head_tensors
from dsft.models.random_values import RandomValues
from dsft.models.weights import Weights
from dsft.packed import PackedWeight

if TYPE_CHECKING:
    from dsft.models.files import ModelFiles


class Values(Protocol):
    """Where a base model's tensors (parameters and persistent buffers) come from."""

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Tensors of the checkpoint that the model has no place for."""

    def __contains__(self, name: str) -> bool:
        """True if this tensor of the base model has a value here."""

    def full(self, name: str, device: torch.device | None = None) -> Tensor:
        """The whole tensor in the base model's dtype, on device (CPU if None)."""

    def fill(self, name: str, out: Tensor, start: int) -> None:
        """Write rows start, start + 1, ... of the tensor into out (any dtype and device; contiguous)."""

    def apart(self, name: str) -> bool:
        """True if fill makes some rows of the tensor without making all of it."""


def open_values(files: "ModelFiles", dtype: torch.dtype, seed: int) -> Values:
    """The values of the base model that build_meta(files, dtype) describes; opening reads headers only.

    files.init = pretrained: from files.folder; raises ValueError if a tensor is missing or has another shape.
    files.init = random: from (seed, name), the same for every number of ranks. A head for sequences that the folder has
    not, or not for as many labels, has no value here.
    """
    twin = build_meta(files, dtype, attention="eager")  # never changed by a method, unlike the model to be filled
    new = head_tensors(twin) if files.labels else frozenset()
    if files.init == "random":
        return RandomValues(twin, seed, new)
    if files.folder is None:
        raise ValueError(
            f"model {files.name_or_path} must have weights to start from, got only its shape; "
            "set model.path to its folder, or model.init=random"
        )
    return CheckpointValues(twin, Weights(files.folder), new)


def matrices(
    values: Values, name: str, packed: PackedWeight, device: torch.device, wanted: range | None = None
) -> Iterator[Tensor]:
    """Yield the matrices that packed is made of, on device: the tensor called name, or each of a stack in order.

    wanted: numbers of the matrices of a stack, all if None. No more of a stack is in memory than one of them, where
    they can be made apart.
    """
    numbers = range(packed.shape[0]) if wanted is None else wanted
    if len(packed.shape) < 3:
        yield values.full(name, device)
    elif not values.apart(name):
        whole = values.full(name, device)
        yield from (whole[index] for index in numbers)
    else:
        for index in numbers:
            out = torch.empty(1, *packed.shape[1:], dtype=packed.dtype, device=device)
            values.fill(name, out, index)
            yield out[0]
