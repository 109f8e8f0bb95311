"""A base so large that it is not read at once."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dsft.cache.remembered import FINE_NS

if TYPE_CHECKING:
    from dsft.models.files import ModelFiles


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Callable[..., ModelFiles]":
    """72 MiB in one tensor, written long enough ago to be remembered, in a cache of its own that knows nothing."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from dsft.models.files import ModelFiles

    monkeypatch.setenv("DSFT_CACHE", str(tmp_path / "cache"))

    def write(family: str) -> ModelFiles:
        folder = tmp_path / "big"
        folder.mkdir()
        config = AutoConfig.for_model(family)
        config.save_pretrained(folder)
        save_file({"wte.weight": torch.zeros(18 * 2**20)}, folder / "model.safetensors")
        time.sleep(2 * FINE_NS / 1e9)
        return ModelFiles(
            config=config, folder=folder, name_or_path=str(folder), init="pretrained", revision=None,
            trust_remote_code=False,
        )  # fmt: skip

    return write
