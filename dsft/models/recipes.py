"""Which tensors of a checkpoint make which tensor of the model, by transformers' own renamings and converters.

Follows transformers.core_model_loading.convert_and_load_state_dict_in_model, without loading anything.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsft.models.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one tensor of the model is made.

    target: its name as the converter gives it; layer: the converter's first target; sources: (converter's pattern,
    name on disk), in the order in which the converter wants them; converter: None if the source is the tensor itself.
    """

    target: str
    layer: str
    sources: tuple[tuple[str, str], ...]
    converter: Any
    shape: tuple[int, ...]

    def convert(
        self, model: "PreTrainedModel", read: Callable[[str], Tensor], rows: slice | None = None
    ) -> dict[str, Tensor]:
        """All tensors that the converter makes of what read gives; rows: of each pattern's sources, only these."""
        converter = copy.deepcopy(self.converter)
        for pattern in dict.fromkeys(pattern for pattern, _ in self.sources):
            sources = [source for other, source in self.sources if other == pattern]
            for source in sources[rows] if rows else sources:
                converter.add_tensor(self.layer, source, pattern, partial(read, source))
        made: dict[str, Any] = converter.convert(self.layer, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def rows_are_sources(self) -> bool:
        """True if row i of the result needs only the i-th source of each pattern: experts stacked along dim 0."""
        from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

        first, *rest = self.converter.operations
        keeps_rows = all(
            (isinstance(op, Concatenate) and op.dim > 0)
            or (isinstance(op, Transpose) and not op.check_dims and 0 not in (op.dim0, op.dim1))
            for op in rest
        )
        counts = {sum(other == pattern for other, _ in self.sources) for pattern, _ in self.sources}
        return isinstance(first, MergeModulelist) and first.dim == 0 and keeps_rows and counts == {self.shape[0]}


def plan(
    model: "PreTrainedModel", tensors: dict[str, Tensor], weights: Weights
) -> tuple[dict[str, Recipe], tuple[str, ...]]:
    """Model tensor -> recipe, and the checkpoint's tensors that the model has no place for.

    model: on meta; tensors: its state dict. Raises ValueError if the library cannot convert what the folder holds.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    rename = partial(_rename, model=model, tensors=tensors, renamings=renamings, converters=converters)
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    groups: dict[str, list[tuple[str | None, str]]] = {}
    surplus = []
    for source in sorted(weights.names, key=dot_natural_key):
        layer, pattern = rename(source)
        if layer in tensors:
            groups.setdefault(layer, []).append((pattern, source))
        else:
            surplus.append(source)
    recipes: dict[str, Recipe] = {}
    for layer, sources in groups.items():
        pattern, source = sources[0]
        if pattern is None:
            shape = weights.shape(source)
            recipes[layer] = Recipe(target=layer, layer=layer, sources=(("", source),), converter=None, shape=shape)
        else:
            recipes.update(_converted(model, layer, sources, by_pattern[pattern], weights))
    return recipes, tuple(surplus)


def tolerated(model: "PreTrainedModel", name: str) -> bool:
    """True if the model's class says that its checkpoints may hold this tensor without need (old rotary buffers)."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
    return any(re.search(pattern, name) for pattern in patterns)


def _rename(
    source: str,
    *,
    model: "PreTrainedModel",
    tensors: dict[str, Tensor],
    renamings: list[Any],
    converters: list[Any],
) -> tuple[str, str | None]:
    """Name in the model and the converter's pattern (None: renamed only), for one name of the checkpoint."""
    from transformers.core_model_loading import rename_source_key

    prefix = model.base_model_prefix
    layer, pattern = rename_source_key(source, renamings, converters, prefix, tensors)
    if layer not in tensors and source in tensors:
        layer, pattern = rename_source_key(source, [], [], base_model_prefix=prefix, meta_state_dict=tensors)
    return layer, pattern


def _converted(
    model: "PreTrainedModel", layer: str, sources: Sequence[tuple[str | None, str]], converter: Any, weights: Weights
) -> dict[str, Recipe]:
    """The recipes of everything that one run of the converter makes; it is run on meta to learn names and shapes."""
    named = tuple((pattern or "", source) for pattern, source in sources)
    draft = Recipe(target=layer, layer=layer, sources=named, converter=converter, shape=())

    def meta(source: str) -> Tensor:
        return torch.empty(weights.shape(source), dtype=weights.dtype(source), device="meta")

    try:
        made = draft.convert(model, meta)
    except Exception as error:  # the converters raise whatever their tensor operations raise
        raise ValueError(
            f"model.path: transformers cannot make {layer} from {len(named)} tensors such as {named[0][1]} ({error}); "
            "the folder is incomplete, or of another model"
        ) from error
    return {name: replace(draft, target=name, shape=tuple(value.shape)) for name, value in made.items()}
