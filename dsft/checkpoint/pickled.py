"""The index of a checkpoint of an earlier dsft: a pickle of torch's, of which nothing is run and no class is made.

A pickle names functions and has them called. Here each name must be one that torch's index holds, and stands for a note
of what it was called with; what the notes say becomes an Index. So a file that somebody put there cannot do anything.
"""

import io
import pickle
import re
from collections.abc import Mapping
from typing import Any

from dsft.checkpoint.index import Held, Index, Piece, numbers, text

FILE = ".metadata"
"""What the index was called: torch's own name for it."""

DCP = "torch.distributed.checkpoint.metadata"
NAMES = {
    **{(DCP, name): name for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    )},
    ("dsft.checkpoint.files", "Place"): "Place",
    ("torch", "Size"): "Size",
    ("torch.serialization", "_get_layout"): "layout",
    ("pathlib", "PosixPath"): "path",
    ("pathlib._local", "PosixPath"): "path",
    ("builtins", "set"): "set",
}  # fmt: skip
"""All that such an index names besides torch's dtypes."""
DTYPE = re.compile(r"(u?int|float|bfloat|complex)\d\w*|bool")
ROOT = "state."
"""Before the name of every tensor, as torch saw it."""


def read(content: bytes) -> Index:
    """Return the index. Raises ValueError if content is none, or names what does not belong in one."""
    try:
        return _understood(_Reader(io.BytesIO(content)).load())
    except MemoryError:
        raise
    except Exception as error:  # whatever a broken pickle raises
        raise ValueError(str(error) or type(error).__name__) from error


class _Note:
    """What stands for an object: the arguments of its making, and its state."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """kinds: a class of notes for each name; made anew, so that a pickle that changes one changes no other reading."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.kinds = {kind: type(kind, (_Note,), {}) for kind in NAMES.values()}

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of a name; nothing is imported."""
        if module == "torch" and DTYPE.fullmatch(name):
            return name
        if (module, name) not in NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in an index")
        return self.kinds[NAMES[module, name]]


def _understood(whole: Any) -> Index:
    state = _state(whole, "Metadata")
    places = {}
    for key, place in state["storage_data"].items():
        which = _state(key, "MetadataIndex")
        places[which["fqn"], _size(which["offset"])] = _state(place, "Place")
    return {
        text(name).removeprefix(ROOT): _held(name, _state(held, "TensorStorageMetadata"), places)
        for name, held in state["state_dict_metadata"].items()
    }


def _held(name: str, held: Mapping[str, Any], places: Mapping[tuple[str, tuple[int, ...]], Any]) -> Held:
    dtype, *_ = _kind(held["properties"], "TensorProperties").state
    pieces = []
    for chunk in (_state(each, "ChunkStorageMetadata") for each in held["chunks"]):
        offsets = _size(chunk["offsets"])
        place = places[name, offsets]
        start = numbers([place["offset"]])[0]
        pieces.append(Piece(offsets, _size(chunk["sizes"]), text(place["relative_path"]), start))
    return Held(text(dtype), _size(held["size"]), tuple(pieces))


def _kind(value: Any, kind: str) -> Any:
    if not isinstance(value, _Note) or type(value).__name__ != kind:
        raise TypeError(f"{type(value).__name__} in place of {kind}")
    return value


def _state(value: Any, kind: str) -> Mapping[str, Any]:
    state = _kind(value, kind).state
    if not isinstance(state, dict):
        raise TypeError(f"a {kind} without content")
    return state


def _size(value: Any) -> tuple[int, ...]:
    return numbers(_kind(value, "Size").args[0])
