"""An adapter that a run starts from: of this base by its content, else by its name, and finite; or it is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsft.origin import check, same_name

BASE = "meta-llama/Llama-3.1-8B"
ONE, TWO = ({"base_fingerprint": "f", "base_digest": digit * 64} for digit in "12")


def peft(folder: Path, base: object, value: float = 1.0) -> str:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    save_file({"a": torch.ones(2), "b": torch.tensor([1.0, value])}, folder / "adapter_model.safetensors")
    return str(folder)


def run(folder: Path, digest: str) -> Path:
    peft(folder / "adapter", BASE)
    (folder / "config.yaml").touch()
    (folder / "provenance.json").write_text(json.dumps({"base_fingerprint": "f", "base_digest": digest}))
    return folder


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_a_runs_adapter_is_of_this_base_by_its_content(inside: str, tmp_path: Path) -> None:
    path = str(run(tmp_path / "run", "1" * 64) / inside)
    assert check(path, ONE, "/another/name/of/it") is None
    with pytest.raises(
        ValueError, match=r"by its content\), got one of .* \(111111111111\); take the model that it was"
    ):
        check(path, TWO, BASE)


def test_another_folders_adapter_is_of_this_base_by_its_name_and_that_is_said(tmp_path: Path) -> None:
    path = peft(tmp_path / "theirs", "Meta-Llama/Llama-3.1-8B")
    assert "known by the name alone" in str(check(path, TWO, BASE))
    with pytest.raises(
        ValueError, match=r"must be an adapter of this base model, Qwen/Qwen3-8B, got one of Meta-Llama"
    ):
        check(path, TWO, "Qwen/Qwen3-8B")
    assert "was not checked" in str(check(peft(tmp_path / "unnamed", None), TWO, BASE))
    assert check(None, TWO, BASE) is None


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_an_adapter_that_is_not_finite_is_refused_by_its_tensor(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold finite numbers, got NaN or Inf in b of .*; take an adapter"):
        check(peft(tmp_path / "theirs", BASE, value), TWO, BASE)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (BASE, "meta-llama/llama-3.1-8b", True),
        (BASE, "/cache/hub/models--meta-llama--Llama-3.1-8B/snapshots/0abc", True),
        (BASE, "/models/Llama-3.1-8B/", True),
        (BASE, "other/Llama-3.1-8B", False),
        (BASE, "meta-llama/Llama-3.1-70B", False),
        ("/models/tiny", "models/tiny", True),
    ],
)
def test_names_of_one_base(one: str, other: str, same: bool) -> None:
    assert same_name(one, other) is same
    assert same_name(other, one) is same
