"""A folder's safetensors, by plain file reads into the tensor that wants them: never mapped, never twice in memory.

Mapped pages count in a process's peak (VmHWM) and stay until the kernel wants them back; a read does not.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsft.models.headers import Entry, read_headers

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CHUNK_BYTES = 16 * 2**20
"""Size of the staging buffer where dtype or device differ: large enough for full disk speed, small beside a shard."""


class Weights:
    """The tensors of one model folder. Raises ValueError for a damaged folder (see headers.py)."""

    def __init__(self, folder: Path) -> None:
        self._entries = read_headers(folder)
        self._staging: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the files, in file order."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type on disk. Raises ValueError for one that torch lacks."""
        code = self._entries[name].dtype
        if code not in DTYPES:
            raise ValueError(f"model.path: {self._entries[name].file} holds {name} as {code}, which torch cannot read")
        return DTYPES[code]

    def read(self, name: str) -> Tensor:
        """The whole tensor, on CPU, as on disk."""
        return self._filled(name, torch.empty(self.shape(name), dtype=self.dtype(name)), 0)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dim 0, on CPU, as on disk; only these bytes are read."""
        shape = self.shape(name)
        assert 0 <= start <= stop <= shape[0], (name, start, stop, shape)
        return self._filled(name, torch.empty((stop - start, *shape[1:]), dtype=self.dtype(name)), start)

    def fill(self, name: str, out: Tensor, start: int) -> None:
        """Write rows start, start + 1, ... of name into out (any dtype and device; contiguous), as many as out has."""
        self._filled(name, out, start)

    def _filled(self, name: str, out: Tensor, start: int) -> Tensor:
        assert out.is_contiguous(), name
        entry, dtype = self._entries[name], self.dtype(name)
        offset = entry.start + start * _row_bytes(entry, dtype)
        flat = out.view(-1)
        with entry.file.open("rb", buffering=0) as stream:
            if out.dtype == dtype and out.device.type == "cpu":
                _read(stream.fileno(), offset, flat, entry)
                return out
            step = CHUNK_BYTES // dtype.itemsize
            for first in range(0, flat.numel(), step):
                target = flat[first : first + step]
                chunk = self._stage(target.numel(), dtype)
                _read(stream.fileno(), offset + first * dtype.itemsize, chunk, entry)
                target.copy_(chunk)
        return out

    def _stage(self, count: int, dtype: torch.dtype) -> Tensor:
        if self._staging is None:
            self._staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        return self._staging[: count * dtype.itemsize].view(dtype)


def _row_bytes(entry: Entry, dtype: torch.dtype) -> int:
    return math.prod(entry.shape[1:]) * dtype.itemsize


def _read(file: int, offset: int, flat: Tensor, entry: Entry) -> None:
    """Fill a flat CPU tensor with the file's bytes from offset on; a read may come back short, so it is repeated."""
    if flat.numel() == 0:
        return
    bytes_of: Any = flat.view(torch.uint8).numpy()
    view = memoryview(bytes_of)
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done : done + 2**30]], offset + done)
        if count == 0:
            raise RuntimeError(
                f"{entry.file} ended at byte {offset + done} while it was read: it changed under the run"
            )
        done += count
