"""Where a model comes from: a folder or a hub id, with the published shape of well-known ones for planning offline."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsft.models.files import ModelFiles, check_folder
from dsft.models.headers import weight_files
from dsft.models.numbers import config_of
from dsft.offline import STAGE, AbsentError, unplugged

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
SHAPE_FILES, CODE_FILES = ("*.json", "*.jinja", "*.model", "*.txt"), ("*.py",)
"""What a hub repository is asked for besides weights: configuration, tokenizer, template; and code that is trusted."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model in a local folder or on the hub.

    config: the published numbers of the hub id named in config_of (both null for any other model), used when path is
    that id, no folder is at hand, and no weights are needed.
    """

    path: str
    init: Literal["pretrained", "random"]
    revision: str | None
    trust_remote_code: bool
    config_of: str | None
    config: dict[str, Any] | None

    def __post_init__(self) -> None:
        """Refuse values that name no model."""
        require_init(self.init)
        if not self.path:
            raise ValueError("model.path must be a model folder or a hub id, got an empty one; set model.path")
        if (self.config is None) != (self.config_of is None):
            raise ValueError("model.config and model.config_of go together: give both or set both to null")

    def check(self, *, planning: bool = False) -> None:
        """Refuse a folder that cannot be loaded, and code of a hub that may change; no torch, no network.

        planning: its weights are not needed. Raises ValueError.
        """
        folder = local_folder(self.path)
        if folder is not None:
            check_folder(folder, weights=self.init == "pretrained" and not planning)
        elif self.trust_remote_code and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                "model.revision must be a full commit, 40 hexadecimal digits, where code of a hub is to run "
                f"(trust_remote_code), got {self.revision or 'none'} for {self.path}; set it to the commit whose code "
                "you trust, or give a folder by a path that leads to it from here"
            )
        if folder is not None and self.trust_remote_code:
            _check_own_code(folder)

    def resolve(self, *, planning: bool = False) -> ModelFiles:
        """Find the model, downloading it where path is a hub id. planning: its weights are not needed.

        Raises ValueError if it cannot be found or read.
        """
        self.check(planning=planning)
        folder = self._folder(planning)
        name = self.path if folder is None or local_folder(self.path) is None else str(folder)
        config = _published(self.config) if folder is None else read_shape(folder, self.trust_remote_code)
        return ModelFiles(
            config=config,
            folder=folder,
            name_or_path=name,
            init=self.init,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )

    def own_code(self) -> Path | None:
        """Find the folder whose *.py run with the model, as resolve does; None where none is trusted. Runs nothing.

        Raises ValueError as resolve does.
        """
        if not self.trust_remote_code:
            return None
        self.check()
        return self._folder(planning=False)

    def _folder(self, planning: bool) -> Path | None:
        shape_only = planning or self.init == "random"
        folder = local_folder(self.path)
        if folder is None and not (shape_only and self.path == self.config_of):
            return _download(self.path, self.revision, weights=not shape_only, code=self.trust_remote_code)
        return folder


def require_init(init: str) -> None:
    """Raise ValueError unless init is one of the two."""
    if init not in ("pretrained", "random"):
        raise ValueError(f"model.init must be pretrained or random, got {init}")


def local_folder(path: str) -> Path | None:
    """The folder that path names, absolute; None if it reads as a hub id and no such folder is here.

    Raises ValueError if path is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() or not HUB_ID.fullmatch(path):
        if not folder.is_dir():
            what = "which is a file" if folder.is_file() else "which does not exist"
            raise AbsentError(f"model.path must be a model folder or a hub id, got {path}, {what}")
        return folder.resolve()
    return None


def read_shape(folder: Path, trust_remote_code: bool) -> "PretrainedConfig":
    """The folder's configuration. Raises ValueError if transformers does not know its type."""
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises half a dozen types here, huggingface_hub's strict one among them
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model.path: transformers cannot read {folder / 'config.json'} ({reason}); "
            "correct it, or set model.trust_remote_code=true if the model brings code that you trust"
        ) from error
    return config


def _published(numbers: dict[str, Any] | None) -> "PretrainedConfig":
    assert numbers is not None
    return config_of(numbers)


def _check_own_code(folder: Path) -> None:
    """Refuse code of another repository (`ID--module.Class`), which comes as it is on the day. Raises ValueError."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            described = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # whoever needs the file says so
            continue
        named = described.get("auto_map") if isinstance(described, dict) else None
        if "--" in (said := json.dumps(named)):
            raise ValueError(
                f"model.path must bring the code that it is trusted for, got {folder / name}, whose auto_map names "
                f"another repository: {said[:200]}; put the *.py beside it and take the part up to -- out of the names"
            )


def _download(path: str, revision: str | None, *, weights: bool, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*SHAPE_FILES, *(("*.safetensors",) if weights else ()), *(CODE_FILES if code else ())]
    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=patterns, etag_timeout=10))
        if weights and unplugged():
            weight_files(folder)  # other programs leave parts of a model in the same cache
    except Exception as error:  # httpx and huggingface_hub errors share no useful base; each means: not obtained
        if unplugged():
            raise AbsentError(
                f"model.path must be a local folder or whole in the hub's cache, got {path}, which is neither; {STAGE}"
            ) from None
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"model.path={path} is no local folder and the hub did not give it ({type(error).__name__}: {reason}); "
            "set model.path to a folder that has it, or HF_TOKEN if it is gated, or model.init=random"
        ) from None
    check_folder(folder, weights=weights)
    if code:
        _check_own_code(folder)
    return folder
