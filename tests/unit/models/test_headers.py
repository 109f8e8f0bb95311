"""What dsft says of a safetensors file is what the safetensors library says; always in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsft.models.headers import INDEX, LONGEST, SINGLE, read_header, read_headers


def header(**tensors: Any) -> bytes:
    return json.dumps({name: _tensor(*value) for name, value in tensors.items()}).encode()


def _tensor(start: Any, stop: Any, shape: Any = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


BAD: dict[str, tuple[bytes, int]] = {
    "overlap": (header(a=(0, 4), b=(2, 6)), 6),
    "one inside another": (header(a=(0, 8), b=(2, 4)), 8),
    "hole": (header(a=(0, 4), b=(6, 8)), 8),
    "hole at the beginning": (header(a=(2, 4)), 4),
    "bytes behind the last": (header(a=(0, 4)), 8),
    "bytes without a tensor": (b"{}", 4),
    "too few bytes": (header(a=(0, 8)), 4),
    "a name twice": (b'{"a":' + header(x=(0, 2))[6:-1] + b',"a":' + header(x=(2, 4))[6:-1] + b"}", 4),
    "offsets below 0": (header(a=(-4, 0, [4])), 0),
    "offsets in turn": (header(a=(4, 0, [4])), 4),
    "a negative size": (header(a=(0, 4, [-4])), 4),
    "two negative sizes": (header(a=(0, 4, [-2, -2])), 4),
    "a size that is no number": (header(a=(0, 4, ["4"])), 4),
    "a size that is true": (header(a=(0, 1, [True])), 1),
    "a size with a point": (header(a=(0, 4, [4.0])), 4),
    "a size of 5,000 digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', 4),
    "an unknown type": (header(a=(0, 4, [4], "U7")), 4),
    "no offsets": (b'{"a":{"dtype":"U8","shape":[4]}}', 4),
    "three offsets": (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,2,4]}}', 4),
    "a number in place of a tensor": (b'{"a":1}', 0),
    "a list": (b"[]", 0),
    "deep": (b'{"a":' * 100_000, 0),
    "deep lists": (b"[" * 100_000, 0),
    "NaN": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', 4),
    "no UTF-8": (b'{"\xff":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4),
    "UTF-16": (header(a=(0, 4)).decode().encode("utf-16"), 4),
    "half a character": (b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', 4),
    "metadata that is no text": (b'{"__metadata__":{"a":1}}', 0),
    "a longer header than the format has": (b"{}" + b" " * LONGEST, 0),
    "nothing": (b"", 0),
}  # fmt: skip
GOOD: dict[str, tuple[bytes, int]] = {
    "two": (header(b=(4, 8), a=(0, 4)), 8),
    "an empty one between": (header(a=(0, 4), b=(4, 4), c=(4, 8)), 8),
    "a number": (header(a=(0, 4, [], "F32")), 4),
    "none": (b"{}", 0),
    "metadata": (b'{"__metadata__":{"format":"pt"}}', 0),
    "blanks behind": (header(a=(0, 4)) + b"   ", 4),
}


def written(folder: Path, content: tuple[bytes, int]) -> Path:
    head, body = content
    file = folder / SINGLE
    file.write_bytes(len(head).to_bytes(8, "little") + head + bytes(body))
    return file


@pytest.mark.parametrize("case", BAD)
def test_what_the_library_refuses_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    file = written(tmp_path, BAD[case])
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
    with pytest.raises(ValueError, match=r"model\.path: .*model\.safetensors is damaged or truncated: ") as refused:
        read_headers(tmp_path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600 + len(str(tmp_path))


@pytest.mark.parametrize("case", GOOD)
def test_what_the_library_takes_is_taken(case: str, tmp_path: Path) -> None:
    file = written(tmp_path, GOOD[case])
    with safe_open(file, "pt") as opened:
        assert set(read_header(file)) == set(opened.keys())


@pytest.mark.parametrize("said", [
    {"weight_map": {"a": "../outside.safetensors"}}, {"weight_map": {"a": "/etc/hostname"}}, {"weight_map": {"a": 3}},
    {"weight_map": {"a": ""}}, {"weight_map": {"a": "pytorch_model.bin"}}, {"weight_map": ["a"]}, {"weight_map": None},
    [], 3, "deep", "twice",
], ids=str)  # fmt: skip
def test_an_index_stays_in_its_folder(said: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    save_file({"a": torch.ones(1)}, folder / "a.safetensors")
    odd = {"deep": "[" * 100_000, "twice": '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}'}
    (folder / INDEX).write_text(odd.get(said) or json.dumps(said) if isinstance(said, str) else json.dumps(said))
    with pytest.raises(ValueError, match=r"model\.path: .*index\.json is damaged or truncated: ") as refused:
        read_headers(folder)
    assert "\n" not in str(refused.value)


def test_one_file_comes_before_an_index_as_transformers_has_it(tmp_path: Path) -> None:
    for name in (SINGLE, "a.safetensors"):
        save_file({name: torch.ones(1)}, tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a.safetensors": "a.safetensors"}}))
    assert set(read_headers(tmp_path)) == {SINGLE}


def put_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def rename_the_weights(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "weights.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")


def name_other_weights(folder: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "transformers_weights": "other.safetensors"}))


@pytest.mark.parametrize(("change", "says"), [
    (put_an_adapter, r"adapter_config\.json beside config\.json, .*; move the adapter"),
    (rename_the_weights, r"with weights\.safetensors alone; save the model with save_pretrained"),
    (name_other_weights, r"transformers_weights in .*; take it out"),
])  # fmt: skip
def test_a_folder_in_which_others_see_other_files_is_refused(
    change: Callable[[Path], None], says: str, tmp_path: Path, source: Callable[..., Any]
) -> None:
    from shutil import copytree

    folder = Path(copytree(source("tiny").resolve().folder, tmp_path / "base"))
    source("custom", path=str(folder)).check()
    change(folder)
    with pytest.raises(ValueError, match=r"model\.path must (be|hold) .*" + says) as refused:
        source("custom", path=str(folder)).check()
    assert "\n" not in str(refused.value)


def test_an_adapter_that_is_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    from dsft.methods import peft_bridge

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"must hold adapter_model\.safetensors, got none; let PEFT save it again"):
        peft_bridge.load(torch.nn.Linear(1, 1), tmp_path)
