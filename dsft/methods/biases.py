"""Biases where a model was built without: zeros to begin with, and what it takes to keep them in a whole model."""

import copy
from typing import Any

import torch
from torch import nn


def add_bias(linear: nn.Linear) -> None:
    """Give linear, packed or not, a bias of zeros of its weight's type."""
    _fill(linear, torch.Size([linear.out_features]))


def whole_with_biases(model: Any) -> Any:
    """The model with a config that its family builds to the same parameters, biases included; on meta too.

    Each switch of the config whose name ends in "bias" is turned on where biases were added; what that adds beside
    them is filled with zeros, which is exact. Raises ValueError if the family has no place for a bias of model.
    """
    held = _shapes(model)
    for config in (model.config, _switched(model.config)):
        built = _shapes(_on_meta(type(model), config))
        misfits = [name for name, shape in held.items() if built.get(name) != shape]
        extra = [name for name in built if name not in held]
        if not misfits and all(name.endswith(".bias") for name in extra):
            for name in extra:
                _fill(model.get_submodule(name.removesuffix(".bias")), built[name])
            model.config = config
            return model
    raise ValueError(
        f"--to merged must have a place for every bias, got {[*misfits, *extra][0]}, which {type(model).__name__} "
        "cannot be built with; take --to adapter"
    )


def _fill(owner: Any, shape: torch.Size) -> None:
    owner.bias = nn.Parameter(torch.zeros(shape, dtype=owner.weight.dtype, device=owner.weight.device))


def _switched(config: Any) -> Any:
    """A copy of config with its biases on."""
    switched = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if key.endswith("bias") and value is False:
            setattr(switched, key, True)
    return switched


def _on_meta(kind: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = kind(copy.deepcopy(config))
    return model


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: param.shape for name, param in model.named_parameters(remove_duplicate=False)}
