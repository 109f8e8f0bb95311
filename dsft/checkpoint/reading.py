"""Files of a checkpoint to tensors, as torch's DCP plans it; what is hashed is what is loaded."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from dsft.checkpoint import manifest, pickled, verified
from dsft.checkpoint.files import ROOT
from dsft.checkpoint.index import Held, Index, Piece
from dsft.checkpoint.manifest import Damage, DamagedError, Manifest
from dsft.strategy import Shape

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def shapes(index: Index) -> dict[str, Shape]:
    """Name -> whole shape and type of all that a checkpoint holds."""
    return {name: (torch.Size(held.size), DTYPES[held.dtype]) for name, held in index.items()}


def index_of(folder: Path, content: Manifest) -> Index:
    """Return where the tensors of a checkpoint lie: as its manifest says, or as the file that was its index before.

    Raises DamagedError if that file is not what was written, or is no index of files of these sizes.
    """
    if content.index is not None:
        index, name = content.index, manifest.FILE
    else:
        index, name = _pickled(folder, content), pickled.FILE
    if wrong := _misfit(index, content):
        raise DamagedError(Damage(name, wrong))
    return index


def _pickled(folder: Path, content: Manifest) -> Index:
    with verified.checked(folder, content, pickled.FILE) as file:
        raw = bytearray(content.files[pickled.FILE].size)
        file.take(memoryview(raw))
    try:
        return pickled.read(bytes(raw))
    except ValueError as error:
        raise DamagedError(Damage(pickled.FILE, f"cannot be read ({error})")) from error


def _misfit(index: Index, content: Manifest) -> str:
    """Return what index says that cannot be so of these files; empty if it fits."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in content.files}
    for name, held in index.items():
        if held.dtype not in DTYPES:
            return f"has {name} as {held.dtype!r:.40}, which is no type of torch's"
        for piece in held.pieces:
            if piece.file not in spans:
                return f"does not list {piece.file!r:.100}, where {name} lies"
            spans[piece.file].append((piece.start, piece.start + _nbytes(held, piece)))
    for file, taken in spans.items():
        end = 0
        for start, stop in sorted(taken):
            if start < end or stop > content.files[file].size:
                return f"has a tensor at bytes {start} to {stop} of {file}, where it cannot be"
            end = stop
    return ""


def _nbytes(held: Held, piece: Piece) -> int:
    return math.prod(piece.sizes) * DTYPES[held.dtype].itemsize


class Reading:
    """What this rank reads of a checkpoint into state. files: names of the files."""

    def __init__(self, state: Mapping[str, Tensor], index: Index) -> None:
        self.index, self.planner = index, DefaultLoadPlanner(flatten_sharded_tensors=False)
        self.planner.set_up_planner({ROOT: dict(state)}, _metadata(index), is_coordinator=False)
        self.wanted: dict[str, dict[Piece, list[ReadItem]]] = {}
        pieces = {name: {piece.offsets: piece for piece in held.pieces} for name, held in index.items()}
        for item in self.planner.create_local_plan().items:
            piece = pieces[_name(item)][_offset(item)]
            self.wanted.setdefault(piece.file, {}).setdefault(piece, []).append(item)

    @property
    def files(self) -> set[str]:
        """Names of the files."""
        return {*self.wanted}

    def fill(self, folder: Path, content: Manifest) -> None:
        """Fill state, in place, and verify each file as it is read: what state holds is what was hashed.

        Raises DamagedError for the first file that is not what was written; state is worth nothing then.
        """
        for name, pieces in sorted(self.wanted.items()):
            with verified.checked(folder, content, name) as file:
                for piece, items in sorted(pieces.items(), key=lambda each: each[0].start):
                    self._fill(file, piece, items)

    def _fill(self, file: verified.Checked, piece: Piece, items: Sequence[ReadItem]) -> None:
        held = self.index[_name(items[0])]
        file.skip(piece.start)
        block = torch.empty(_nbytes(held, piece), dtype=torch.uint8)
        file.take(memoryview(block.numpy()))  # type: ignore[arg-type]
        whole = block.view(DTYPES[held.dtype]).reshape(piece.sizes)
        for item in items:
            part = whole
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, start, length)
            self.planner.resolve_tensor(item).detach().copy_(part)


def _name(item: ReadItem) -> str:
    name: str = item.storage_index.fqn.removeprefix(f"{ROOT}.")
    return name


def _offset(item: ReadItem) -> tuple[int, ...]:
    assert item.storage_index.offset is not None
    return tuple(item.storage_index.offset)


def _metadata(index: Index) -> Metadata:
    """Return the index as DCP's planner has it."""
    return Metadata(
        {
            f"{ROOT}.{name}": TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[held.dtype]),
                torch.Size(held.size),
                [ChunkStorageMetadata(torch.Size(each.offsets), torch.Size(each.sizes)) for each in held.pieces],
            )
            for name, held in index.items()
        }
    )
