"""Several results over one base: each is what it is alone, whoever spoke before, and the base stays itself."""

import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsft.adapters import Adapters, by_base, load
from dsft.checkpoint.digests import of_all, of_tensor
from dsft.compose import read
from dsft.data.dialogue import prompt_of
from dsft.loaded import load as alone
from dsft.loaded import unpacked_base
from dsft.results import find
from tests.contract.sessions import METHODS, composed_of, left_by

TOKENS = torch.arange(40)[None] + 60


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    return logits


def _digest(adapters: Adapters) -> str:
    return of_all({name: of_tensor(value) for name, value in adapters.base.state_dict().items()})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of every method on the tiny model."""
    root = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        left_by(root / method, method)
    return {method: root / method for method in METHODS}


def test_every_method_beside_every_other_is_what_it_is_alone(runs: dict[str, Path]) -> None:
    first, *others = by_base(find(list(runs.values())))
    packed = ["int8_lora", "qlora"]  # on bases of their own
    assert [[result.name for result in group] for group in others] == [[name] for name in packed]
    adapters = Adapters(first)
    assert adapters.names() == tuple(method for method in METHODS if method not in packed)
    before, base = _digest(adapters), _logits(adapters.switch(None))
    assert torch.equal(base, _logits(unpacked_base(read(runs["lora"]))))
    logits = {name: _logits(adapters.switch(name)) for name in adapters.names()}
    for name in reversed(adapters.names()):
        assert torch.equal(_logits(adapters.switch(name)), logits[name]), name
        expected = _logits(alone(read(runs[name]), runs[name] / "adapter"))
        assert torch.equal(logits[name], expected), name
        assert not torch.equal(logits[name], base), name
    assert torch.equal(_logits(adapters.switch(None)), base)
    assert _digest(adapters) == before


@pytest.mark.parametrize("packing", ["nf4", "int8"])
def test_packed_bases_stay_packed_and_shared(packing: str, tmp_path: Path) -> None:
    methods = ("lora", "houlsby", "bitfit", "ssf", "prefix", "vera")
    runs = {method: tmp_path / method for method in methods}
    for method, run_dir in runs.items():
        left_by(run_dir, method, f"quantization={packing}")
    adapters = load(*runs.values())
    packed = {value.data_ptr() for value in adapters.base.parameters() if value.dtype is torch.uint8}
    before = _digest(adapters)
    for method, run_dir in runs.items():
        model = adapters.switch(method)
        assert packed <= {value.data_ptr() for value in model.parameters()}
        assert torch.equal(_logits(model), _logits(alone(read(run_dir), run_dir / "adapter"))), method
    assert packed
    assert _digest(adapters) == before


@pytest.mark.parametrize("packing", ["nf4", "int8"])
def test_adapters_of_packed_experts_answer_as_they_were_trained(packing: str, tmp_path: Path) -> None:
    words = ("model=tiny_moe", f"quantization={packing}", "method.target_modules=[all-linear,experts]")
    left_by(tmp_path / "experts", "lora", *words, "method.expert_rank=3")
    left_by(tmp_path / "linears", "lora", *words[:2])
    adapters = load(tmp_path / "experts", tmp_path / "linears")
    base = _logits(adapters.switch(None))
    packed = {value.data_ptr() for value in adapters.base.parameters() if value.dtype is torch.uint8}
    for name in ("experts", "linears"):
        model = adapters.switch(name)
        assert packed <= {value.data_ptr() for value in model.parameters()}
        truth = _logits(alone(read(tmp_path / name), tmp_path / name / "adapter"))
        torch.testing.assert_close(_logits(model), truth, rtol=0, atol=1e-5)
        assert not torch.allclose(truth, base, atol=1e-2)
    assert torch.equal(_logits(adapters.switch(None)), base)


def test_no_tensor_of_the_base_exists_twice(runs: dict[str, Path]) -> None:
    adapters = load(runs["lora"], runs["pfeiffer"], runs["prefix"])
    base = {value.data_ptr() for value in adapters.base.parameters()}
    for name in adapters.names():
        assert base <= {value.data_ptr() for value in adapters.switch(name).parameters()}, name


def test_a_folder_of_pefts_that_trains_biases_leaves_the_bases_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    """PEFT copies biases and saved modules into the model that it is given."""
    files = composed_of("lora").run.model.resolve()
    base = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head", "norm"]
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "modules_to_save" in name:
                param.add_(0.1)
    model.eval().save_pretrained(tmp_path / "theirs")
    adapters = load(runs["lora"], tmp_path / "theirs")
    before = _logits(adapters.switch(None))
    assert torch.equal(_logits(adapters.switch("theirs")), _logits(model))
    assert torch.equal(_logits(adapters.switch(None)), before)
    only = load(tmp_path / "theirs")  # its own configuration names the base
    assert only.names() == ("theirs",)


def test_prompts_are_answered_one_after_the_other_as_alone(runs: dict[str, Path]) -> None:
    adapters = load(*(runs[method] for method in ("lora", "prefix", "houlsby")))
    together = adapters.compare("What is 2 + 2?", max_new_tokens=8)
    assert list(together) == ["base", "lora", "prefix", "houlsby"]
    assert adapters.current is None
    assert adapters.compare("What is 2 + 2?", max_new_tokens=8) == together
    assert load(runs["prefix"]).compare("What is 2 + 2?", max_new_tokens=8)["prefix"] == together["prefix"]


@pytest.mark.parametrize("method", ["bitfit", "compacter"])
def test_what_the_page_says_is_done_after_a_run_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "chat.md").read_text()
    for name, trained in (("a", "lora"), ("b", method)):
        left_by(tmp_path / "runs" / name, trained, "train.precision=bf16")
    shutil.copytree(tmp_path / "runs" / "a" / "adapter", tmp_path / "a_folder_of_pefts")
    monkeypatch.chdir(tmp_path)
    said: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, said)
    tokens = said["tokens"]["input_ids"]
    assert said["logits"].shape[:2] == tokens.shape
    assert said["logits"].dtype is torch.bfloat16
    assert said["written"].shape[1] > tokens.shape[1]
    with pytest.raises(RuntimeError, match="dtype"), torch.no_grad():
        said["model"](**said["tokens"])  # else the page asks for too much


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix"])
def test_virtual_tokens_count_in_the_models_reach(runs: dict[str, Path], tmp_path: Path, method: str) -> None:
    shutil.copytree(runs[method] / "adapter", tmp_path / "alone")
    taken = read(runs[method]).method.positions
    assert taken > 0
    adapters = load(runs[method], tmp_path / "alone")
    known = adapters.base.config.max_position_embeddings
    around = len(prompt_of(adapters.tokenizer, [{"role": "user", "content": "x"}], "\n")) - 1  # a token per byte
    for name, before in ((None, 0), (method, taken), ("alone", taken)):
        adapters.switch(name)
        most = [{"role": "user", "content": "x" * (known - before - 1 - around)}]
        assert isinstance(adapters.answer(most, max_new_tokens=8), str)
        more = [{"role": "user", "content": "x" * (known - before - around)}]
        with pytest.raises(ValueError, match=f"must have 1 to {known - before - 1} tokens, .*, got {known - before};"):
            adapters.answer(more, max_new_tokens=8)


def test_an_unknown_name_and_other_bases_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    adapters = load(runs["lora"])
    with pytest.raises(ValueError, match="there is no result lroa; did you mean lora"):
        adapters.switch("lroa")
    with pytest.raises(ValueError, match=r"packed and computed alike, got .*qlora.*; load them apart"):
        load(runs["lora"], runs["qlora"])
    left_by(tmp_path / "other", "lora", "model.seed=1")
    with pytest.raises(ValueError, match=r"must be of the base of lora, .* got other of"):
        load(runs["lora"], tmp_path / "other")


def test_an_adapter_that_does_not_fit_its_base_is_refused_in_one_line(runs: dict[str, Path], tmp_path: Path) -> None:
    adapters = load(runs["lora"])
    for method, word in (("lora", "size mismatch"), ("rslora", "missing adapter keys"), ("houlsby", "other tensor")):
        folder = tmp_path / method
        shutil.copytree(runs[method] / "adapter", folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        first = min(tensors)
        odd = tensors.pop(first)
        if method != "rslora":
            tensors[first] = odd[:-1].contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"must fit the base .*{word}") as caught:
            adapters.add(find([folder])[0])
        assert "\n" not in str(caught.value)
    assert adapters.names() == ("lora",)
