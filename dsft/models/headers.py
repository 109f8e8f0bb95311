"""Safetensors files by their headers alone: what a folder holds and where, without torch and without reading a weight.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the tensors (safetensors README, "Format").
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: bytes [start, stop) of the file, row-major."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path) -> dict[str, Entry]:
    """Tensor name -> entry. Raises ValueError naming the file if it is cut short or is no safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(_damaged(file, f"its header needs {8 + length} bytes and the file has {size}"))
        raw = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        entries = {name: _entry(file, 8 + length, value) for name, value in header.items() if name != "__metadata__"}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_damaged(file, f"its header is not that of a safetensors file ({error})")) from None
    needed = max((entry.stop for entry in entries.values()), default=8 + length)
    if needed > size:
        raise ValueError(_damaged(file, f"its header promises {needed} bytes and the file has {size}"))
    return entries


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the model's weights, in name order.

    Raises ValueError if the folder has none, or if the index names a file that is missing.
    """
    index = folder / INDEX
    if index.is_file():
        files = sorted({folder / file for file in _weight_map(index).values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"model.path: {index} names {len(missing)} missing shard(s), first {missing[0]}; download them again"
            )
        return tuple(files)
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return tuple(files)
    found = f"{len(files)} of them without {INDEX}" if files else "no *.safetensors"
    raise ValueError(
        f"model.path must be a folder with {SINGLE} or {INDEX}, got {folder} with {found}; "
        "save the model with save_pretrained, or set model.init=random"
    )


def read_headers(folder: Path) -> dict[str, Entry]:
    """Tensor name -> entry, over all weight files of a folder; the same errors as read_header and weight_files."""
    entries: dict[str, Entry] = {}
    for file in weight_files(folder):
        entries.update(read_header(file))
    index = folder / INDEX
    if index.is_file():
        absent = [name for name in _weight_map(index) if name not in entries]
        if absent:
            raise ValueError(
                f"model.path: {index} names {len(absent)} tensor(s) that no shard holds, first {absent[0]}; "
                "the folder mixes two downloads: download it again"
            )
    return entries


def _entry(file: Path, base: int, value: dict[str, Any]) -> Entry:
    first, last = value["data_offsets"]
    shape = tuple(int(size) for size in value["shape"])
    expected = math.prod(shape) * ITEM_BYTES[value["dtype"]]
    if last - first != expected:
        raise ValueError(f"a tensor of {expected} bytes is given {last - first}")
    return Entry(file, value["dtype"], shape, base + first, base + last)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(_damaged(index, f"it is not a safetensors index ({error})")) from None
    return weight_map


def _damaged(file: Path, why: str) -> str:
    return f"model.path: {file} is damaged or truncated: {why}; download or copy it again"
