"""How dsft calls a model, where a class takes less than that: see protocols.Batch for what a row of examples is."""

import inspect
from typing import Any

from torch import Tensor, nn

from dsft.models.family import Family
from dsft.protocols import PREFIX

ROW = ("segment_lengths", "position_ids")
"""Arguments that say where the examples of a row begin."""


def fit(model: nn.Module, family: Family) -> None:
    """Let model be called with a row's segments and positions, the rows to keep of the logits, and without a cache.

    What its class does not take is left out where that changes nothing: one example from position 0 is what every
    model expects. Rows of logits that it cannot choose are chosen from all of them. Raises RuntimeError at a call with
    several examples of a model that computes each alone; ValueError for a method whose keys come before an example's
    own (PREFIX), where dsft's attention does not compute the model.
    """
    require_prefixes(model, family)
    fitted = Fitted(model, family)
    model.register_forward_pre_hook(fitted.begin, with_kwargs=True)
    if not takes_rows(model):
        model.register_forward_hook(fitted.end)


def require_prefixes(model: nn.Module, family: Family) -> None:
    """Refuse a method whose keys come before an example's own, where dsft's attention does not compute the model."""
    if not family.ragged and any(PREFIX in module._modules for module in model.modules()):
        raise ValueError(
            f"method must do without keys and values that come before an example for {type(model).__name__}, which "
            "computes attention itself; take method=prompt or method=lora"
        )


def takes_rows(model: nn.Module) -> bool:
    """Return True if the class can be told which rows of its logits are wanted."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


class Fitted:
    """Leaves out of a call what a class does not take. rows: what is wanted of the logits of this call."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        taken = inspect.signature(type(model).forward).parameters
        extra = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values())
        self.family, self.rows = family, None
        wanted = () if family.ragged and extra else ("segment_lengths",)
        self.left_out = {key for key in ("position_ids", "use_cache") if key not in taken} | set(wanted)
        if not family.ragged:
            self.left_out |= set(ROW)
        self.slices = "logits_to_keep" not in taken

    def begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Leave out of a call what the class does not take."""
        lengths = kwargs.get("segment_lengths")
        if lengths is None:  # a call as others make it, to generate
            return args, kwargs
        if not self.family.packs and len(lengths) > 1:
            raise RuntimeError(
                f"{type(model).__name__} got {len(lengths)} examples in one row, whose tokens it would mix"
            )
        kwargs = {key: value for key, value in kwargs.items() if key not in self.left_out}
        if self.slices:
            self.rows = kwargs.pop("logits_to_keep", None)
        return args, kwargs

    def end(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Choose rows of the logits (1, T, V)."""
        if isinstance(self.rows, Tensor):
            output.logits = output.logits[:, self.rows]
        self.rows = None
        return output
