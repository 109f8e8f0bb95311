"""The token cache: a folder per digest, written once, whole or not at all, by however many processes start together."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from dsft.cache import sealed
from dsft.cache.root import cache_root as cache_root
from dsft.cache.root import open_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 6
"""Raise it when the same input must give other tokens, masks or files than the code before."""
INPUTS = 2
"""The version in the digest of what goes in. Run folders keep that digest: raised, none of them would go on."""

_BLOCK = 2**22
"""Elements that are hashed at a time."""


def digest_of(identity: dict[str, Any]) -> str:
    """SHA-256 of identity as canonical JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """What decides a fast tokenizer's output: its serialised form, its template, its special tokens."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # state of earlier calls, not content
    backend.no_padding()
    return [
        hashlib.sha256(backend.to_str().encode()).hexdigest(),
        tokenizer.chat_template,
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
    ]


def content_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each array and file of the token sets in folder: by "train/tokens", "eval/answers" and so on.

    Of an array's type, shape and values, not of its file, whose header is numpy's own.
    """
    found = {}
    for path in sorted(folder.glob("*/*")):
        name = f"{path.parent.name}/{path.stem}"
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
            state = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
            for start in range(0, len(array), _BLOCK):
                state.update(array[start : start + _BLOCK].tobytes())
            found[name] = state.hexdigest()
        elif path.suffix == ".jsonl":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[f"{path.parent.name}/names"] = digest_of({"names": json.loads(path.read_text())["names"]})
    return found


def token_folder(root: Path, inputs: str, day: str | None) -> Path:
    """Return the folder of the tokens that come of inputs (their digest) and of the day that a chat template is told.

    The packages that render and tokenise have a part in it: another version of them may write something else.
    """
    packages = {name: version(name) for name in ("jinja2", "tokenizers", "transformers")}
    identity = {"version": VERSION, "inputs": inputs, "day": day, "packages": packages}
    return root / "tokens" / digest_of(identity)


def heads(folder: Path) -> dict[str, list[int | str]]:
    """Size and SHA-256 of each file in folder; of a .npy of the bytes before its values."""
    return {path.relative_to(folder).as_posix(): _head(path) for path in sealed.names_in(folder)}


CONTENTS: sealed.Contents = {"files": heads, "arrays": content_digests}
"""What a folder's digests are of: together of every byte in it. A run's tokens_digest is made of its arrays."""


def _head(path: Path) -> list[int | str]:
    """Size of a file, and SHA-256 of its bytes; of a .npy of its header, which says where its values begin."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(12)
        length = size
        if path.suffix == ".npy" and first[:6] == b"\x93NUMPY":
            wide = first[6] > 1  # format 1 has two bytes for the length of its header, later ones four
            length = int.from_bytes(first[8:12] if wide else first[8:10], "little") + (12 if wide else 10)
        stream.seek(0)
        return [size, hashlib.sha256(stream.read(length)).hexdigest()]


def digests_of_arrays(folder: Path) -> dict[str, str]:
    """The content_digests of a folder that find_or_build has compared with them."""
    arrays: dict[str, str] = json.loads((folder / sealed.FILE).read_text(encoding="utf-8"))["arrays"]
    return arrays


def find_or_build(folder: Path, build: Callable[[Path], None], *, compare: bool = True) -> Path:
    """The folder, of token_folder; build(aside) fills it if it is not there yet, or is not as it was written.

    compare: False takes a folder that is there as it is: another process of this node has read every byte of it. One
    process builds while the others wait; the folder appears by rename once its files are on disk, so that a killed
    build leaves nothing that could be taken for a whole one. Raises ValueError if its root cannot be written, or may
    be written by others.
    """
    open_folder(folder.parents[1], folder.parent.name)
    if folder.is_dir() and (not compare or sealed.changed(folder, CONTENTS) is None):
        return folder
    try:
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"DSFT_CACHE must be a folder that can be written, got {folder.parents[1]} ({reason}); set DSFT_CACHE"
        ) from None
    try:
        wrong = sealed.changed(folder, CONTENTS) if folder.is_dir() else ""
        if wrong is not None:
            _build_aside(folder, build, wrong)
    finally:
        lock.release()
    return folder


def _build_aside(folder: Path, build: Callable[[Path], None], wrong: str) -> None:
    """Build, and give the folder its name. wrong: what is wrong with the one that has it, "" if there is none."""
    aside = folder.with_suffix(".part")
    shutil.rmtree(aside, ignore_errors=True)  # of a build that was killed: the lock says that nobody writes it
    aside.mkdir()
    if wrong:  # at once: a rank that is ended while it builds is given the time for it the next time
        shutil.rmtree(sealed.make_way(folder, "the token cache", wrong), ignore_errors=True)
    build(aside)
    sealed.seal(aside, CONTENTS)
    _flush(aside)
    aside.rename(folder)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
