"""A checkpoint's values by the model's names, one parameter at a time: never more of it in memory than that."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsft.models.build import base_tensors
from dsft.models.recipes import plan, tolerated
from dsft.models.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 3
"""Names shown of a list of missing tensors."""


class CheckpointValues:
    """The values of one folder for one model. model: on meta; kept, because some converters ask it for shapes.

    new: names of tensors that the folder need not have, as the head of a run's own; it then may have another head.
    Raises ValueError if a tensor of the model is missing, has another shape, or is tied to one with other values.
    """

    def __init__(self, model: "PreTrainedModel", weights: Weights, new: frozenset[str] = frozenset()) -> None:
        self._model, self._weights, self._new = model, weights, new
        self._tensors = base_tensors(model)
        self._recipes, surplus = plan(model, self._tensors, weights)
        if new:  # a language model's head lies beside its body, which has a name
            surplus = tuple(name for name in surplus if name.startswith(f"{model.base_model_prefix}."))
        self.unexpected = tuple(name for name in surplus if not tolerated(model, name))
        for name in new & self._recipes.keys():
            if self._recipes[name].shape != tuple(self._tensors[name].shape):
                del self._recipes[name]
        self._share_tied()
        self._require_all()

    def __contains__(self, name: str) -> bool:
        """True if this tensor of the base model has a value here."""
        return name in self._recipes

    def full(self, name: str, device: torch.device | None = None) -> Tensor:
        """The whole tensor in the base model's dtype, on device (CPU if None)."""
        meta = self._tensors[name]
        out = torch.empty(meta.shape, dtype=meta.dtype, device=device or "cpu")
        self.fill(name, out, 0)
        return out

    def fill(self, name: str, out: Tensor, start: int) -> None:
        """Write rows start, start + 1, ... of the tensor into out (any dtype and device; contiguous)."""
        recipe = self._recipes[name]
        if recipe.converter is None:
            self._weights.fill(recipe.sources[0][1], out, start)
            return
        if recipe.rows_are_sources():  # expert by expert, those of these rows only
            for row, expert in enumerate(out, start):
                made = recipe.convert(self._model, self._weights.read, rows=slice(row, row + 1))
                expert.copy_(made[recipe.target][0])
        elif out.numel() > 0:
            whole = recipe.convert(self._model, self._weights.read)[recipe.target]
            out.copy_(whole[start : start + len(out)] if out.ndim else whole)

    def apart(self, name: str) -> bool:
        """True if some rows of the tensor can be had without converting all of it."""
        recipe = self._recipes[name]
        return recipe.converter is None or recipe.rows_are_sources()

    def _share_tied(self) -> None:
        """Give every name of a tied tensor the recipe that one of its names has."""
        names: dict[int, list[str]] = {}
        for name, tensor in self._tensors.items():
            names.setdefault(id(tensor), []).append(name)
        for tied in (group for group in names.values() if len(group) > 1):
            known = [name for name in tied if name in self._recipes]
            self._require_equal(known)
            for name in tied if known else ():
                self._recipes.setdefault(name, self._recipes[known[0]])

    def _require_equal(self, names: list[str]) -> None:
        for name in names[1:]:
            if not torch.equal(self.full(names[0]), self.full(name)):
                raise ValueError(
                    f"model.path: config.json ties {names[0]} and {name}, but the weights hold two different tensors; "
                    "set tie_word_embeddings to false in its config.json"
                )

    def _require_all(self) -> None:
        kind = type(self._model).__name__
        missing = [name for name in self._tensors if name not in self._recipes and name not in self._new]
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise ValueError(
                f"model.path must hold every weight of {kind}, got none for {', '.join(missing[:SHOWN])}{more}; "
                "give the folder of this model, or model.init=random"
            )
        for name, tensor in self._tensors.items():
            shape = self._recipes[name].shape if name in self._recipes else tuple(tensor.shape)
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"model.path: {name} has shape {shape} in the weights and {tuple(tensor.shape)} by config.json; "
                    "give a folder whose config.json and weights are of one model"
                )
