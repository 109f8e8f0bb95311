"""A small model on CPU as its class makes it, as a run would build it, and as a whole result has it on disk."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsft.comm.world import World
from dsft.engine.dropout import keyed
from dsft.engine.recompute import recompute
from dsft.models import calling, scoring
from dsft.models.anatomy import dissect
from dsft.models.build import build_meta, persistent_buffers
from dsft.models.family import Family
from dsft.models.files import ModelFiles
from dsft.models.materialize import materialize
from dsft.models.values import open_values

ALONE = World(0, 1, 0, torch.device("cpu"))


class UnfitError(Exception):
    """A way to compute the model is not its own way; the text says how."""


def by_class(files: ModelFiles, config: Any, attention: str) -> Any:
    """A new model of config by its class itself, in training, on CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention,
        trust_remote_code=files.trust_remote_code,
    )  # fmt: skip
    return model.train()


def write(model: Any, folder: Path) -> None:
    """Write model as a whole result is; transformers' own way would import DeepSpeed, which takes seconds."""
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {**dict(model.named_parameters()), **persistent_buffers(model)}
    whole = revert_weight_conversion(model, {name: tensor.detach().clone() for name, tensor in tensors.items()})
    held = {name: tensor.contiguous() for name, tensor in whole.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)


def built(small: ModelFiles, family: Family, *, again: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model as a run would build it, all of it learning; again: its blocks are computed again in backward."""
    model: Any = build_meta(small, dtype, family.attention)
    anatomy = dissect(model)
    calling.fit(model, family)
    scoring.install(model, model.get_submodule(anatomy.head))
    if again:
        recompute(model, anatomy, "full", reentrant=False, draws=keyed(model, anatomy, 0, 0))
    values, names = open_values(small, dtype, 0), model.state_dict()
    materialize(
        model, values, ALONE, origins={name: name for name in [*names, *dict(model.named_buffers())]},
        initial=_nothing_is_new, place=lambda module: None,
    )  # fmt: skip
    model.train()
    return model  # type: ignore[no-any-return]


def _nothing_is_new(name: str, param: Tensor) -> Tensor:
    raise UnfitError(f"{name} has no value in the model's folder")
