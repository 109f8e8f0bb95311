"""A model that was found: its shape, its folder, its tokenizer and its digests; and the checks on a folder."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsft import owners
from dsft.cache.remembered import replaced, same, sha256, unread
from dsft.models.headers import INDEX, read_headers, weight_files
from dsft.offline import STAGE, AbsentError, unplugged

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

SMALL_BYTES = 64 * 2**20
"""So much is read at once, wherever it lies: a fraction of a second."""
SAMPLE_BYTES = 1024
READERS = 4
"""Files that are read side by side."""
ADAPTER = "adapter_config.json"
"""What transformers takes for an adapter to put into the model beside it."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The model that model.path names, once it was found.

    folder is None if only the shape is known. An adapter names name_or_path as its base. labels are the names of the
    outputs of a sequence head; they are empty for a language model.
    """

    config: "PretrainedConfig"
    folder: Path | None
    name_or_path: str
    init: Literal["pretrained", "random"]
    revision: str | None
    trust_remote_code: bool
    labels: tuple[str, ...] = ()

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer. Raises ValueError if the folder (or the hub) has none."""
        from transformers import AutoTokenizer, PreTrainedTokenizerBase

        place = self.name_or_path if self.folder is None else str(self.folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                place, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                raise ValueError(f"{type(tokenizer).__name__} is no tokenizer of transformers")
        except Exception as error:  # transformers', those of tokenizers in Rust, and of a model's own code
            kind, reason = ValueError, " ".join(str(error).split())[:160]
            way_out = "put the base model's tokenizer.json and tokenizer_config.json beside its config.json"
            if self.folder is None and unplugged():
                kind, reason, way_out = AbsentError, "the hub's cache has none", STAGE
            raise kind(f"model.path must have a tokenizer, got none in {place} ({reason}); {way_out}") from None
        return tokenizer

    def digest(self) -> str:
        """SHA-256 of the base: 64 hexadecimal digits, the same wherever the folder lies.

        Over the shape (config.json, or the published numbers), every byte of the weights and their index unless they
        are random, and every *.py of the folder. Large files are read once and then remembered
        (dsft.cache.remembered). Raises OSError.
        """
        covered = self._covered()
        with ThreadPoolExecutor(READERS) as pool:  # a file at a time leaves disks and cores idle
            parts = [[*each] for each in zip(covered, pool.map(sha256, covered.values()), strict=True)]
        return hashlib.sha256(json.dumps([self._shape(), self.init, parts]).encode()).hexdigest()

    def digest_at_once(self) -> str | None:
        """digest(), None if it takes long and may as well be read beside the first steps.

        It takes long where more than SMALL_BYTES are to be read. It may not wait where a file is remembered under the
        same name, and is another one now.
        """
        at_once = replaced(self._covered().values()) or self.unread <= SMALL_BYTES
        return self.digest() if at_once else None

    @property
    def unread(self) -> int:
        """Bytes that digest would read now."""
        return unread(self._covered().values())

    def identities(self) -> dict[str, list[int]]:
        """What tells each file that digest reads, by its name: another value says that it was written or replaced."""
        return {name: same(path) for name, path in self._covered().items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the files that digest reads."""
        return sum(path.stat().st_size for path in self._covered().values())

    def _covered(self) -> dict[str, Path]:
        if self.folder is None:
            return {}
        weights = [*weight_files(self.folder), self.folder / INDEX] if self.init == "pretrained" else []
        paths = [path for path in [*weights, *_code(self.folder)] if path.is_file()]
        return {os.path.relpath(path, self.folder): path for path in sorted(paths)}

    def fingerprint(self) -> str:
        """Quick fingerprint of the base: 64 hexadecimal digits, the same wherever the folder lies.

        Over the shape and, for pretrained weights, each file's size and safetensors header; then all bytes where the
        weights are under 64 MiB, else 1 KiB from the middle of each tensor: a second or two for 70 billion parameters.
        Any retrained or re-saved base is told apart by it; a change that somebody means to hide is not.
        """
        state = hashlib.sha256(self._shape().encode())
        if self.init == "pretrained" and self.folder is not None:
            _sample_weights(state, self.folder)
        else:
            state.update(b"random")
        return state.hexdigest()

    def _shape(self) -> str:
        shape: dict[str, Any]
        if self.folder is not None:
            shape = read_config(self.folder)
        else:
            shape = self.config.to_dict()
        return json.dumps({key: shape[key] for key in sorted(shape) if not _is_incidental(key)}, sort_keys=True)


def code_digest(folder: Path) -> str:
    """SHA-256 of every *.py in a model's folder, with its name: 64 hexadecimal digits. Raises OSError."""
    parts = [[os.path.relpath(path, folder), sha256(path)] for path in _code(folder)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _code(folder: Path) -> list[Path]:
    return sorted(path for path in owners.reached(folder) if path.suffix == ".py" and path.is_file())


def check_folder(folder: Path, *, weights: bool) -> None:
    """Refuse a folder that cannot be loaded, in well under a second and without torch.

    weights: its safetensors are wanted too; every header is parsed. Raises ValueError.
    """
    config = read_config(folder)
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"model.path must hold plain weights, got {folder} quantized with {method}; "
            "give the unquantized model and choose quantization=nf4 or int8"
        )
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"model.path must hold a base model alone, got {folder} with {ADAPTER} beside config.json, which other "
            "programs put into the model; move the adapter to a folder of its own and give it as method.init_from"
        )
    if "transformers_weights" in config:
        raise ValueError(
            f"model.path must hold its weights under their usual names, got transformers_weights in "
            f"{folder / 'config.json'}, which other programs read in their place; take it out"
        )
    if weights:
        read_headers(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Raises ValueError if the folder or the file is missing or is no model's."""
    if not folder.is_dir():
        raise ValueError(f"model.path must be a model folder or a hub id, got {folder}, which does not exist")
    file = folder / "config.json"
    if not file.is_file():
        hint = (
            "it holds an adapter: give its base model"
            if (folder / ADAPTER).is_file()
            else ("save a model there with save_pretrained")
        )
        raise ValueError(f"model.path must be a folder with config.json, got {folder} without one; {hint}")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config["model_type"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:  # JSON's and UTF-8's are ValueErrors
        raise ValueError(f"model.path: {file} is not a model's configuration ({error!r}); copy it again") from None
    return config


def _sample_weights(state: "hashlib._Hash", folder: Path) -> None:
    files = weight_files(folder)
    whole = sum(file.stat().st_size for file in files) <= SMALL_BYTES
    entries = read_headers(folder).values()
    for file in files:
        size = file.stat().st_size
        with file.open("rb", buffering=0) as stream:
            length = int.from_bytes(stream.read(8), "little")
            state.update(f"{file.name} {size} {length}".encode())
            state.update(stream.read(size if whole else length))
            for entry in entries:
                if entry.file == file and not whole:
                    middle = (entry.start + entry.stop) // 2
                    state.update(os.pread(stream.fileno(), min(SAMPLE_BYTES, entry.stop - middle), middle))


def _is_incidental(key: str) -> bool:
    """True for keys of a configuration that say who wrote it and not what it is."""
    return key.startswith("_") or key in ("transformers_version", "torch_dtype", "dtype")
