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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 4
"""Raise it when the same input must give other tokens, masks or files than the code before."""
INPUTS = 2
"""The version in the digest of what goes in. Run folders keep that digest: raised, none of them would go on."""

_BLOCK = 2**22
"""Elements that are hashed at a time."""


def cache_root() -> Path:
    """$DSFT_CACHE, or ~/.cache/dsft."""
    root = os.environ.get("DSFT_CACHE")
    return Path(root).expanduser() if root else Path.home() / ".cache" / "dsft"


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


def find_or_build(folder: Path, build: Callable[[Path], None]) -> Path:
    """The folder, of token_folder; build(aside) fills it if it is not there yet.

    One process builds while the others wait; the folder appears by rename once its files are on disk, so that a killed
    build leaves nothing that could be taken for a whole one. Raises ValueError if its root cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"DSFT_CACHE must be a folder that can be written, got {folder.parents[1]} ({reason}); set DSFT_CACHE"
        ) from None
    try:
        if not folder.is_dir():
            aside = folder.with_suffix(".part")
            shutil.rmtree(aside, ignore_errors=True)  # of a build that was killed: the lock says that nobody writes it
            aside.mkdir()
            build(aside)
            _flush(aside)
            aside.rename(folder)
    finally:
        lock.release()
    return folder


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
