"""Checks of where PEFT puts an adapter: which linears it refuses or takes for experts, and which ones it has adapted.

PEFT 0.21 reads a LoRA configuration as one of transformers 4. In a model whose experts are one tensor now, every name
that an expert's linear had there (gate_proj, up_proj, down_proj) means that tensor to it, full names and patterns
included, although linears of those names are left: dense layers, shared experts, gates of an attention. So such a
linear is adapted here without that reading, and named by its weight (target_parameters) in the file, which any loader
of PEFT's puts beside the same linear, with the same numbers.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any

from torch import nn

from dsft.methods.peft_names import unread
from dsft.methods.peft_targets import chosen_linears, shortest
from dsft.protocols import ROLES, Anatomy

Wanted = str | tuple[str, ...]


def configured(
    wanted: Wanted, model: nn.Module, anatomy: Anatomy, config_of: Callable[[list[str]], Any]
) -> tuple[Any, set[str]]:
    """PEFT's configuration of an adapter, and the full names of the linears that it is to adapt.

    config_of(names) makes it. What all-linear or a role means and PEFT refuses is left out; raises ValueError for such
    a linear that is named, and as chosen_linears does.
    """
    chosen = chosen_linears(wanted, anatomy)
    config = config_of(shortest(chosen, model))
    out = left_out(config, model, chosen)
    if not out:
        return config, chosen
    named = [word for word in ((wanted,) if isinstance(wanted, str) else wanted) if word not in ("all-linear", *ROLES)]
    if asked := out & (chosen_linears(tuple(named), anatomy) if named else set()):
        raise ValueError(
            f"method.target_modules must not name {min(asked)}: PEFT refuses it in a {_type(model)} model, as part of "
            "a scan, or its loader takes the name for another module's; leave it out"
        )
    if not chosen - out:
        raise ValueError(
            f"method.target_modules={wanted} must name a linear that PEFT adapts, got {min(out)} alone, which it "
            f"refuses or does not read back in a {_type(model)} model; name others"
        )
    return config_of(shortest(chosen - out, model)), chosen - out


def left_out(config: Any, model: nn.Module, chosen: Iterable[str]) -> set[str]:
    """Those of chosen that PEFT refuses to adapt in a model of this type, or whose adapter its loader would lose."""
    chosen = set(chosen)
    return refused(config, model, chosen) | unread(config, model, chosen)


def refused(config: Any, model: nn.Module, chosen: Iterable[str]) -> set[str]:
    """Those of chosen that PEFT refuses to adapt in a model of this type, since a Mamba block's scan reads them."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    out = set()
    for name in chosen:
        try:
            _check_lora_target_modules_mamba(config, model, _leaf(name))
        except ValueError:
            out.add(name)
    return out


def taken_for_experts(config: Any, model: nn.Module) -> set[str]:
    """Those of the configuration's targets that PEFT would take for experts, or refuse in taking them for such."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    targets = set() if isinstance(config.target_modules, str) else set(config.target_modules or ())
    taken: dict[str, bool] = {}
    for leaf in {_leaf(target) for target in targets}:
        alone = deepcopy(config)
        alone.target_modules, alone.target_parameters = {leaf}, None
        try:
            convert_peft_config_for_transformers(alone, model, None)
            taken[leaf] = alone.target_modules != {leaf}
        except ValueError:  # one of two names that are one tensor there
            taken[leaf] = True
    return {target for target in targets if taken[_leaf(target)]}


@contextlib.contextmanager
def names_as_they_are(config: Any, model: nn.Module) -> Iterator[None]:
    """Let PEFT take every target for the module of that name: inside, the model does not say of which type it is."""
    if not taken_for_experts(config, model):
        yield
        return
    shape: Any = model.config
    shape.model_type = "named"  # of the object; that of its class comes back
    try:
        yield
    finally:
        del shape.model_type


def portable(config: Any, model: nn.Module) -> Any:
    """The configuration as its file holds it: for any loader of PEFT's the adapter lands where it is here."""
    taken = taken_for_experts(config, model)
    if not taken:
        return config
    config = deepcopy(config)
    config.target_parameters = sorted(f"{target}.weight" for target in taken)
    config.target_modules = sorted(set(config.target_modules) - taken)
    config.lora_dropout = 0.0  # which PEFT wants of such a layer; a result is not trained on
    return config


def check_landed(model: nn.Module, chosen: set[str]) -> None:
    """Raise ValueError unless the modules that PEFT has adapted are the ones that were chosen."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    landed = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if landed == chosen:
        return
    missed, other = sorted(chosen - landed), sorted(landed - chosen)
    what = f"adapts {other[0]}, which it does not name" if other else f"does not adapt {missed[0]}"
    raise ValueError(
        f"method.target_modules must be adapted as it is, got {len(missed)} linear(s) left out and {len(other)} other "
        f"module(s) adapted: PEFT {what}; take method.target_modules=attention, or another method"
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _type(model: nn.Module) -> str:
    config: Any = model.config
    return str(config.model_type)
