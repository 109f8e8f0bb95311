"""Checkpoints as dsft wrote them before its manifest held an index: with a pickle of torch's beside it."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dsft.checkpoint import manifest
from dsft.checkpoint.files import Place
from dsft.checkpoint.pickled import FILE


class Payload:
    """Runs text where it is unpickled by torch's own reader."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.text,)


def whole(content: manifest.Manifest, place: Path) -> Metadata:
    """The index of a checkpoint as torch has it, with all that torch writes into it."""
    assert content.index is not None
    tensors, places = {}, {}
    for name, held in content.index.items():
        chunks = [ChunkStorageMetadata(torch.Size(each.offsets), torch.Size(each.sizes)) for each in held.pieces]
        dtype = getattr(torch, held.dtype)
        tensors[f"state.{name}"] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(held.size), chunks)
        for index, each in enumerate(held.pieces):
            length = torch.Size(each.sizes).numel() * dtype.itemsize
            places[MetadataIndex(f"state.{name}", each.offsets, index)] = Place(each.file, each.start, length)
    paths = {name: tuple(name.split(".", 1)) for name in tensors}
    return Metadata(tensors, paths, places, StorageMeta(place, "a", "b"), "1.0.0")  # type: ignore[arg-type]


def as_before(checkpoint: Path, content: object = None) -> None:
    """Make checkpoint one of the format before. content: of its index, in place of the true one; the manifest fits."""
    found = manifest.read(checkpoint)
    raw = pickle.dumps(whole(found, checkpoint) if content is None else content)
    (checkpoint / FILE).write_bytes(raw)
    said = json.loads((checkpoint / manifest.FILE).read_text())
    said = {key: value for key, value in said.items() if key not in ("digest", "index")} | {"format": 1}
    said["files"][FILE] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    (checkpoint / manifest.FILE).write_text(json.dumps({**said, "digest": digest}, indent=1, sort_keys=True))


def plant(checkpoint: Path, ran: Path, *, first: bool = True) -> None:
    """Put code that makes the file `ran` into the index of checkpoint, before or after what is true of it."""
    payload = Payload(f"import pathlib; pathlib.Path({str(ran)!r}).touch()")
    true = whole(manifest.read(checkpoint), checkpoint)
    true.planner_data = [payload, true.planner_data] if first else [true.planner_data, payload]
    as_before(checkpoint, true)
