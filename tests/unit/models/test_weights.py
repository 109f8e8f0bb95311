import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsft.models.headers import INDEX, read_headers
from dsft.models.weights import CHUNK_BYTES, Weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file with several dtypes; the first tensor is longer than a staging chunk in float32."""
    torch.manual_seed(0)
    tensors = {
        "long": torch.randn(1031, CHUNK_BYTES // 4096 + 99),
        "half": torch.randn(7, 5, 3).bfloat16(),
        "bytes": torch.randint(0, 255, (9,), dtype=torch.uint8),
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def test_read_equals_the_safetensors_library(folder: Path) -> None:
    weights, reference = Weights(folder), load_file(folder / "model.safetensors")
    assert set(weights.names) == set(reference)
    for name, tensor in reference.items():
        assert weights.dtype(name) == tensor.dtype
        assert torch.equal(weights.read(name), tensor)


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (0, 1), (2, 5), (6, 7), (4, 4)])
def test_rows_equal_slices(folder: Path, start: int, stop: int) -> None:
    weights = Weights(folder)
    for name in ("long", "half", "bytes"):
        assert torch.equal(weights.rows(name, start, stop), weights.read(name)[start:stop])


def test_fill_casts_chunk_by_chunk(folder: Path) -> None:
    weights = Weights(folder)
    out = torch.empty(1011, *weights.shape("long")[1:], dtype=torch.bfloat16)
    assert out.numel() * 4 > CHUNK_BYTES
    weights.fill("long", out, 20)
    assert torch.equal(out, weights.read("long")[20:1031].bfloat16())


@pytest.mark.parametrize("cut", [4, 20, -1])
def test_a_truncated_file_is_refused_by_name(folder: Path, cut: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated") as caught:
        read_headers(folder)
    assert "\n" not in str(caught.value)


def test_garbage_in_place_of_a_header_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((16).to_bytes(8, "little") + b"version https://git-lfs")
    with pytest.raises(ValueError, match="not that of a safetensors file"):
        read_headers(folder)


def sharded(folder: Path, tiny: Path) -> None:
    """Lay tiny's one file out as two shards and an index."""
    tensors = load_file(tiny / "model.safetensors")
    halves = [dict(sorted(tensors.items())[:10]), dict(sorted(tensors.items())[10:])]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, half in zip(names, halves, strict=True):
        save_file(half, folder / name)
    index = {name: file for file, half in zip(names, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    shutil.copy(tiny / "config.json", folder)


def test_shards_are_read_through_the_index(tmp_path: Path, source: Callable) -> None:
    tiny = source("tiny").resolve().folder
    sharded(tmp_path, tiny)
    split, whole = Weights(tmp_path), Weights(tiny)
    assert all(torch.equal(split.read(name), whole.read(name)) for name in whole.names)


def test_an_index_that_names_a_missing_shard_is_refused(tmp_path: Path, source: Callable) -> None:
    sharded(tmp_path, source("tiny").resolve().folder)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing shard.*model-00002-of-00002"):
        source("custom", path=str(tmp_path)).check()


def test_an_index_that_names_a_missing_tensor_is_refused(tmp_path: Path, source: Callable) -> None:
    sharded(tmp_path, source("tiny").resolve().folder)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="no shard holds"):
        source("custom", path=str(tmp_path)).check()
