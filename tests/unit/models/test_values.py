import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dsft.models.build import build_meta
from dsft.models.files import ModelFiles
from dsft.models.values import open_values


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_load_equals_from_pretrained(pretrained: ModelFiles, dtype: torch.dtype, load: Callable) -> None:
    ours = tensors(load(pretrained, dtype))
    reference = tensors(AutoModelForCausalLM.from_pretrained(pretrained.folder, dtype=dtype))
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_building_on_meta_touches_no_weights(tmp_path: Path, source: Callable) -> None:
    shutil.copy(source("tiny").resolve().folder / "config.json", tmp_path)
    model = build_meta(source("custom", path=str(tmp_path)).resolve(planning=True), torch.bfloat16)
    assert all(tensor.is_meta for tensor in tensors(model).values())
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert model.config.use_cache is False


@pytest.mark.parametrize("name", ["tiny", "tiny_moe"])
def test_rows_of_any_tensor_equal_slices_of_the_whole(name: str, source: Callable) -> None:
    files = source(name).resolve()
    for origin in (files, source(name, init="random").resolve()):
        values = open_values(origin, torch.float32, 3)
        for tensor, meta in build_meta(files, torch.float32).named_parameters():
            whole = values.full(tensor)
            assert whole.shape == meta.shape
            for start, stop in ((0, 1), (1, len(whole)), (len(whole) // 2, len(whole))):
                part = torch.empty_like(whole[start:stop])
                values.fill(tensor, part, start)
                assert torch.equal(part, whole[start:stop]), tensor


def test_experts_are_fused_as_transformers_fuses_them(source: Callable) -> None:
    files = source("tiny_moe").resolve()
    stored = load_file(files.folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert name not in stored
    fused = open_values(files, torch.float32, 0).full(name)
    base = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(fused[2], torch.cat([stored[f"{base}.w1.weight"], stored[f"{base}.w3.weight"]]))


def test_random_values_have_the_scale_of_the_configuration(shape: Callable) -> None:
    files = shape("llama_tied", initializer_range=0.05)
    values = open_values(files, torch.float32, 0)
    assert values.full("model.layers.0.mlp.up_proj.weight").std().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(values.full("model.norm.weight"), torch.ones(64))
    assert torch.equal(values.full("lm_head.weight"), values.full("model.embed_tokens.weight"))
    again, other = open_values(files, torch.float32, 0), open_values(files, torch.float32, 1)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(values.full(name), again.full(name))
    assert not torch.equal(values.full(name), other.full(name))
    assert torch.equal(open_values(shape("gpt2"), torch.float32, 0).full("transformer.ln_f.bias"), torch.zeros(64))


def changed(files: ModelFiles, folder: Path, change: Callable[[dict[str, Tensor]], None], **config: object) -> Path:
    """A copy of the folder with other tensors in it."""
    stored = load_file(files.folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    numbers = json.loads((files.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**numbers, **config}))
    return folder


def test_missing_tensors_are_refused_by_name(tmp_path: Path, source: Callable) -> None:
    folder = changed(source("tiny").resolve(), tmp_path, lambda stored: stored.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"got none for model\.norm\.weight; give"):
        open_values(source("custom", path=str(folder)).resolve(), torch.float32, 0)


def test_a_missing_expert_is_refused(tmp_path: Path, source: Callable) -> None:
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    folder = changed(source("tiny_moe").resolve(), tmp_path, lambda stored: stored.pop(name))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        open_values(source("custom", path=str(folder)).resolve(), torch.float32, 0)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path, source: Callable) -> None:
    folder = changed(source("tiny").resolve(), tmp_path, lambda stored: None, intermediate_size=256)
    with pytest.raises(ValueError, match=r"shape \(192, 128\) in the weights and \(256, 128\) by config.json"):
        open_values(source("custom", path=str(folder)).resolve(), torch.float32, 0)


def test_surplus_tensors_are_told_except_old_rotary_buffers(tmp_path: Path, source: Callable) -> None:
    surplus = {"vision.weight": torch.zeros(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    folder = changed(source("tiny").resolve(), tmp_path, lambda stored: stored.update(surplus))
    assert open_values(source("custom", path=str(folder)).resolve(), torch.float32, 0).unexpected == ("vision.weight",)


def test_a_tied_head_may_be_stored_under_either_name_but_not_differently(tmp_path: Path, source: Callable) -> None:
    def only_head(stored: dict[str, Tensor]) -> None:
        stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")

    (tmp_path / "one").mkdir()
    one = changed(source("tiny").resolve(), tmp_path / "one", only_head, tie_word_embeddings=True)
    values = open_values(source("custom", path=str(one)).resolve(), torch.float32, 0)
    assert torch.equal(values.full("model.embed_tokens.weight"), values.full("lm_head.weight"))
    (tmp_path / "two").mkdir()
    two = changed(source("tiny").resolve(), tmp_path / "two", lambda stored: None, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="two different tensors"):
        open_values(source("custom", path=str(two)).resolve(), torch.float32, 0)
