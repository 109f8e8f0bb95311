"""Safetensors files by their headers alone: what a folder holds and where, without torch and without reading a weight.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the tensors (safetensors README, "Format").
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
METADATA = "__metadata__"
LONGEST = 100_000_000
"""Bytes of a header: the library's own limit."""
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
    """Tensor name -> entry. Raises ValueError naming the file if it is cut short or is no safetensors file.

    As strict as the safetensors library: no name twice, no tensor over another, no byte that is none's, so that two
    programs cannot see two models in one file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(_damaged(file, f"its header needs {8 + length} bytes and the file has {size}"))
        if length > LONGEST:
            raise ValueError(_damaged(file, f"its header has {length} bytes, more than the {LONGEST} of the format"))
        raw = stream.read(length)
    try:
        header: dict[str, Any] = _json(raw)
        entries = {name: _entry(file, 8 + length, value) for name, value in header.items() if name != METADATA}
        _require_texts(header.get(METADATA, {}))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ValueError(_damaged(file, f"its header is not that of a safetensors file ({said:.200})")) from None
    needed = max((entry.stop for entry in entries.values()), default=8 + length)
    if needed > size:
        raise ValueError(_damaged(file, f"its header promises {needed} bytes and the file has {size}"))
    at = 8 + length
    for name, entry in sorted(entries.items(), key=lambda each: (each[1].start, each[1].stop)):
        if entry.start != at:
            raise ValueError(_damaged(file, f"{name:.100} begins at byte {entry.start} and must at {at}"))
        at = entry.stop
    if at != size:
        raise ValueError(_damaged(file, f"its tensors end at byte {at} and the file has {size}"))
    return entries


def _json(raw: bytes) -> Any:
    """JSON as the library takes it: UTF-8, no key twice, no NaN, nothing below 0. Else a ValueError."""
    text = raw.decode("utf-8")
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_int=_whole)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is in it twice")
    for name in found:
        name.encode("utf-8")  # a ValueError for half of a surrogate pair
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text:.40} is no number of bytes")


def _whole(text: str) -> int:
    return _no_number(text) if text.startswith("-") else int(text)


def _require_texts(metadata: Any) -> None:
    if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError(f"{METADATA} holds what is no text")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the model's weights, in name order.

    Raises ValueError if the folder has none, or if the index names a file that is missing.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # first, as transformers has it: both must read the same files
        return (folder / SINGLE,)
    if index.is_file():
        files = sorted({folder / file for file in _weight_map(index).values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                f"model.path: {index} names {len(missing)} missing shard(s), first {missing[0]}; download them again"
            )
        return tuple(files)
    files = sorted(folder.glob("*.safetensors"))
    found = f"{files[0].name} alone" if len(files) == 1 else f"{len(files)} of them without {INDEX}"
    found = found if files else "no *.safetensors"
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
    if not (folder / SINGLE).is_file():
        absent = [name for name in _weight_map(index) if name not in entries]
        if absent:
            raise ValueError(
                f"model.path: {index} names {len(absent)} tensor(s) that no shard holds, first {absent[0]}; "
                "the folder mixes two downloads: download it again"
            )
    return entries


def _entry(file: Path, base: int, value: dict[str, Any]) -> Entry:
    first, last = map(_count, value["data_offsets"])
    shape = tuple(map(_count, value["shape"]))
    expected = math.prod(shape) * ITEM_BYTES[value["dtype"]]
    if last - first != expected:
        raise ValueError(f"a tensor of {expected} bytes is given {last - first}")
    return Entry(file, value["dtype"], shape, base + first, base + last)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r:.40} in place of a size")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file, which is in the folder of index. Raises ValueError, one line, if it says anything else."""
    try:
        weight_map: dict[str, str] = _json(index.read_bytes())["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ValueError(_damaged(index, f"it is not a safetensors index ({said:.200})")) from None
    for file in files:
        if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise ValueError(_damaged(index, f"it names {file!r:.100}, which is no safetensors file of its folder"))
    return weight_map


def _damaged(file: Path, why: str) -> str:
    return f"model.path: {file} is damaged or truncated: {why}; download or copy it again"
