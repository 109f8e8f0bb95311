"""An adapter is filed under names that PEFT's loader reads back as its modules; a linear without one is left out."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dsft.compose import compose
from dsft.methods.peft_bridge import inject, load
from dsft.methods.peft_landing import configured
from dsft.models.anatomy import dissect
from dsft.models.build import build_meta
from dsft.models.files import ModelFiles
from dsft.models.small import fill, small_copies

pytestmark = pytest.mark.skipif(
    "inkling2_text" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, reason="transformers without these models"
)


def _on_meta(config: Any) -> Any:
    files = ModelFiles(
        config=config, folder=None, name_or_path="m", init="random", revision=None, trust_remote_code=False
    )
    return build_meta(files, torch.float32, "eager")


def _small(model_type: str) -> Any:
    return next(small_copies(AutoConfig.for_model(model_type), _on_meta))


def _method(*words: str) -> Any:
    return compose(["method=lora", "method.rank=2", "method.alpha=4", "run_dir=none", *words]).run.method


def _adapted(method: Any, model: Any) -> Any:
    return inject(model, *configured("all-linear", model, dissect(model), method.config), on_meta=False)


def test_an_adapter_of_modules_whose_names_peft_changes_is_read_back(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_config(_small("laguna"), dtype=torch.float32).eval()
    fill(base)
    row, method = torch.arange(5, 45)[None], _method()
    model = _adapted(method, copy.deepcopy(base))
    weights = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for param in weights.values():
        torch.nn.init.normal_(param, std=0.1)
    written = method.save(model, {name: param.detach() for name, param in weights.items()}, tmp_path, "m")
    with torch.no_grad():
        assert torch.equal(load(base, tmp_path)(row).logits, model(row).logits)
    # PEFT itself files a module's own name
    for file in (written, {name.replace(".shared_expert.", ".shared_experts."): written[name] for name in written}):
        save_file(file, tmp_path / "adapter_model.safetensors")
        stored = _method(f"method.init_from={tmp_path}").stored(model)
        assert stored.keys() == weights.keys()
        assert all(torch.equal(stored[name], weights[name]) for name in weights)


def test_a_linear_whose_adapter_peft_would_lose_is_left_out_and_refused_by_name() -> None:
    model = _on_meta(_small("inkling2_text"))
    take = partial(configured, model=model, anatomy=dissect(model), config_of=_method().config)
    _, chosen = take("all-linear")
    left = dissect(model).linears.keys() - chosen
    assert {name.rpartition("self_attn.")[2] for name in left} >= {"k_sconv.weight_proj"}
    assert all(name.endswith("sconv.weight_proj") for name in left)
    with pytest.raises(ValueError, match=r"must not name model\..*sconv\.weight_proj: PEFT .* its loader takes"):
        take(("weight_proj",))
