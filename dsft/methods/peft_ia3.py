"""(IA)^3 on PEFT's layers, by a target map of our own: keys, values, and what enters the down projection."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsft.methods.peft_bridge import Bridged, inject
from dsft.methods.peft_targets import chosen_linears, shortest
from dsft.protocols import Anatomy

KEYS = ("k_proj", "key", "k_lin", "wk", "k")
VALUES = ("v_proj", "value", "v_lin", "wv", "v")
DOWNS = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "c_proj", "wo", "lin2")
"""Last parts of the names of linears, by what they are; a down projection lies outside of attention."""

FUSED = ("qkv_proj", "query_key_value", "c_attn", "wqkv", "qkv", "in_proj")
"""Last parts of the names of linears that hold queries, keys and values in one."""


@dataclass(frozen=True, kw_only=True)
class IA3(Bridged):
    """K and V are multiplied by a vector each, the input of the down projection by one; all start at 1.

    Parameters: layers x (2 x width of keys + width of the MLP). Keys are scaled as k_proj gives them, before the
    rotary embedding. target_modules: auto, or linears as for lora; feedforward_modules: those of them whose input is
    scaled and not their output, auto or linears, [] for none.
    Source: Liu et al. 2022, arXiv:2205.05638, section 3.3; code: PEFT's tuners/ia3 (whose own map takes queries for
    keys in Qwen, Gemma, OPT, Phi, GPT-J).
    """

    target_modules: str | tuple[str, ...]
    feedforward_modules: str | tuple[str, ...]

    def attach(self, model: nn.Module, anatomy: Anatomy) -> nn.Module:
        """Freeze the base and put PEFT's layers around the targets, on meta."""
        inputs = self._inputs(anatomy)
        chosen = self._targets(anatomy) | inputs
        return inject(model, self._config(shortest(chosen, model), sorted(inputs)), chosen)

    def config(self, targets: list[str]) -> Any:
        """PEFT's own configuration object, no input scaled."""
        return self._config(targets, [])

    def _config(self, targets: list[str], inputs: list[str]) -> Any:
        from peft import IA3Config

        suffixes = sorted({name.rpartition(".")[2] for name in inputs})
        short = set(suffixes) <= set(targets)
        return IA3Config(
            target_modules=targets, feedforward_modules=suffixes if short else inputs, task_type="CAUSAL_LM"
        )

    def _targets(self, anatomy: Anatomy) -> set[str]:
        """Keys and values, or what the user named."""
        if self.target_modules != "auto":
            return chosen_linears(self.target_modules, anatomy)
        attention = [name for name, role in anatomy.linears.items() if role == "attention"]
        keys, values = _ending(attention, KEYS), _ending(attention, VALUES)
        fused = _ending(anatomy.linears, FUSED)
        if not (len(keys) == len(values) > 0):
            found = f"{_leaf(min(fused))}, which holds queries, keys and values in one" if fused else _some(attention)
            raise ValueError(
                f"method.target_modules=auto needs a linear for keys and one for values, got {found}; name the linears "
                "to scale, or take method=lora"
            )
        return keys | values

    def _inputs(self, anatomy: Anatomy) -> set[str]:
        """Down projections, or what the user named."""
        if self.feedforward_modules == ():
            return set()
        if self.feedforward_modules != "auto":
            return chosen_linears(self.feedforward_modules, anatomy, "method.feedforward_modules")
        rest = [name for name, role in anatomy.linears.items() if role != "attention"]
        downs = _ending(rest, DOWNS)
        if anatomy.experts or not downs:
            found = f"{len(anatomy.experts)} layers whose experts are one tensor" if anatomy.experts else _some(rest)
            raise ValueError(
                f"method.feedforward_modules=auto needs a linear down projection in each block, got {found}; name "
                "them, or take method.feedforward_modules=[] to scale keys and values alone"
            )
        return downs

    def initial(self, model: nn.Module, name: str, param: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """All 1."""
        return torch.ones(param.shape)


def _ending(names: Iterable[str], leaves: tuple[str, ...]) -> set[str]:
    return {name for name in names if _leaf(name).lower() in leaves}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted({_leaf(name) for name in names})) or "none"
