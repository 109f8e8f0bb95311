"""Results on disk, of runs and of others: whose base they sit on, how they are called. Reads small files, headers."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsft import learned, owners
from dsft.again import command_of
from dsft.compose import load_yaml
from dsft.door import brief
from dsft.folder import base_then_and_now, provenance, state
from dsft.headed import KIND, scores_sequences
from dsft.locate import Allowed
from dsft.models.files import check_folder
from dsft.models.source import local_folder
from dsft.published import require

BASE = "base"
"""Name of the base without a result on it."""

TAKEN = (BASE, "all")
"""Names that mean something else."""

PEFT, NATIVE, WHOLE = "adapter_config.json", "dsft_adapter.json", "config.json"
"""What tells the format of a result: PEFT's, dsft's own, or a whole model."""

CHANGED = ("pissa", "olora", "corda", "loftq")
"""Beginnings of PEFT's init_lora_weights that change the base beside the adapter."""

ELSEWHERE = (
    "megatron_config", "adapters", "tokenizer_kwargs", "arrow_config", "corda_config", "lora_ga_config", "shadow_model",
    "prompt_tuning_init_state_dict_path",
)  # fmt: skip
"""Keys of PEFT's files that name a module, another model or files to be loaded beside; a plain adapter has none."""

TENSORS = "adapter_model.safetensors"
"""What an adapter has learned, in either format."""

JOINED = ("prompt_completion", "text")
"""Formats of data whose prompt goes on without a line break where there is no chat template."""


@dataclass(frozen=True)
class Result:
    """One result. folder: its files; run_dir: of the run that left it, None for an adapter's folder alone.

    base: where its base is; known: base_fingerprint and base_digest of the base, as far as they are known; seen: how
    the base was packed and computed in training, "" if not known; system, joint: what its conversations began with, and
    what stood between a question and its answer where there is no chat template; whole: it is a model and no adapter.
    """

    name: str
    folder: Path
    run_dir: Path | None
    base: str
    known: Mapping[str, str]
    seen: str
    system: str | None
    joint: str
    whole: bool

    def on_the_base_of(self, other: "Result") -> bool:
        """True if both sit on one base model, by its content where that is known of both."""
        if {"base_fingerprint"} <= self.known.keys() & other.known.keys():
            mine, theirs = base_then_and_now(self.known, other.known)
            return mine == theirs
        return self.base == other.base


def find(
    paths: Sequence[Path | str], *, names: Sequence[str] | None = None, trust: bool = False,
    trust_remote_code: bool = False,
) -> list[Result]:  # fmt: skip
    """What each path holds: a run's folder, its adapter/, or an adapter's folder, PEFT's or ours.

    names: instead of the ends of the paths that tell them apart; trust: a run's folder may be one that others write;
    trust_remote_code: the base model's own code may run. Raises ValueError, one line, for what is no result and
    for results of several base models; torch is imported when all else is right.
    """
    folders = [_folder(Path(path).expanduser()) for path in paths]
    if len({folder.resolve() for folder, _ in folders}) < len(folders):
        raise ValueError(f"RUN must be given once, got one of {', '.join(map(str, paths))} twice; leave it out")
    called = _short([run_dir or folder for folder, run_dir in folders]) if names is None else list(names)
    for name in called:
        if name in TAKEN:
            raise ValueError(f"a result must not be called {name}, which means something else here; rename its folder")
    found = [_read(name, folder, run_dir, trust=trust) for name, (folder, run_dir) in zip(called, folders, strict=True)]
    for other in found[1:]:
        if not other.on_the_base_of(found[0]):
            raise ValueError(
                f"RUN must be of the base of {found[0].name}, {_told(found[0])}, got {other.name} of {_told(other)}; "
                "give results of one base model at a time"
            )
    for result in found:
        _check_code(result, trust_remote_code=trust_remote_code)
        _check_base(result)
        _check_tensors(result)
    return found


def _folder(path: Path) -> tuple[Path, Path | None]:
    """The folder of a result, and of its run."""
    try:
        return _found(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"RUN must be a folder that can be read, got {brief(path)}: {reason}; give the run_dir of a run"
        ) from error


def _found(path: Path) -> tuple[Path, Path | None]:
    if (path.parent / "config.yaml").is_file() and path.name == "adapter":
        path = path.parent
    if (path / "config.yaml").is_file():
        if not _format(path / "adapter"):
            raise ValueError(f"RUN must have a result, {path} {_why_none(path)}")
        return path / "adapter", path
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"RUN must be a run's folder, got {path}, which {what}; give the run_dir of a run")
    if _format(path) not in (PEFT, NATIVE):
        raise ValueError(
            f"RUN must be a run's or an adapter's folder, got {path} without config.yaml, {PEFT} or {NATIVE}; give the "
            "run_dir of a run, of one point of a sweep"
        )
    return path, None


def _why_none(run_dir: Path) -> str:
    """What keeps a run from having a result, and the way out."""
    found = state(run_dir)
    if found.get("state") == "diverged":
        return f"has diverged and has none: {found.get('reason')}; begin anew with other settings, in another run_dir"
    return f"is {found.get('state', 'not started')} and has none; finish it: {command_of(run_dir)}"


def _format(folder: Path) -> str | None:
    return next((name for name in (PEFT, NATIVE, WHOLE) if (folder / name).is_file()), None)


def _read(name: str, folder: Path, run_dir: Path | None, *, trust: bool) -> Result:
    if run_dir is not None:
        owners.check(run_dir, "RUN", trust=trust)
    kind = _format(folder)
    assert kind is not None
    described = _json(folder / kind)
    start = described.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGED):
        raise ValueError(
            f"RUN must hold a plain adapter, got {folder} with init_lora_weights={start}, whose base was changed too; "
            "convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    if scores_sequences(folder):
        raise ValueError(
            f"RUN must hold a result that answers, got {folder}, whose head gives numbers of a sequence; load it with "
            f"transformers' AutoModel{KIND} and, if it is an adapter, PEFT"
        )
    whole = kind == WHOLE
    if run_dir is None:
        base = described.get("base_model_name_or_path" if kind == PEFT else "base_model")
        if not isinstance(base, str):
            raise ValueError(f"RUN must name its base, got {folder / kind} without; put it in")
        if re.search(r"^[^/]+@[0-9a-f]{16}$", base) and not Path(base).exists():
            raise ValueError(
                f"RUN must name a base that can be found, got {base} in {folder / kind}, a folder of the machine that "
                "exported it; put the path or hub id of that model there, or export with --with-base-path"
            )
        return Result(name, folder, None, base, {}, "", None, "\n", whole)
    tree = _tree(run_dir / "config.yaml")
    plan = _json(run_dir / "plan.json")
    seen = json.dumps([_packing(tree["quantization"], plan), tree["train"]["precision"]], sort_keys=True)
    data = tree["data"]
    joint = "" if data.get("format") in JOINED else "\n"
    known = provenance(run_dir)
    base = str(plan.get("model"))
    return Result(name, folder, run_dir, base, known, seen, data.get("system"), joint, whole)


def _packing(quantization: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a quantization that decide a base's bytes: whether experts are packed is one where there are any."""
    experts = "experts" in plan.get("parameters", {}).get("by_role", {})
    rest = {key: value for key, value in quantization.items() if key not in ("experts", "unpack_mib")}
    return {**rest, "experts": experts and quantization.get("experts", False)}


def _check_code(result: Result, *, trust_remote_code: bool) -> None:
    """Refuse what names code, or other files, to be loaded with it. Raises ValueError; imports nothing."""
    if result.run_dir is not None:
        learned.check(result.run_dir, trust_remote_code=trust_remote_code)
    kind = _format(result.folder)
    assert kind is not None
    file, described = result.folder / kind, _json(result.folder / kind)
    if kind == NATIVE:
        method = described.get("method")
        if not isinstance(method, Mapping) or "_target_" not in method:
            raise ValueError(f"RUN must be whole, got {file} without the class of its method; restore it")
        if (why := Allowed(file).refusal(str(method["_target_"]))) is not None:
            raise ValueError(f"an adapter must name a class that can be imported, got {method['_target_']} {why}")
    for key in ELSEWHERE if kind == PEFT else ():
        if (value := described.get(key)) and value != "mirror":  # shadow_model: of the base itself
            raise ValueError(
                f"RUN must hold an adapter that is in its folder alone, got {file} of {owners.owner_of(file)} with "
                f"{key}={value!r}, which lets PEFT load more; take another adapter, or remove the key if you know it"
            )


def _check_base(result: Result) -> None:
    """Refuse a base that is no longer where it was."""
    path, pretrained = result.base, True
    if result.run_dir is not None:
        model = _tree(result.run_dir / "config.yaml")["model"]
        path, pretrained = model.get("path"), model.get("init") != "random"
    folder = None if path is None else local_folder(path)
    if folder is not None:
        check_folder(folder, weights=pretrained)


def _check_tensors(result: Result) -> None:
    """Refuse files that are missing or cut short: by their headers, before a base is loaded for them."""
    if not result.whole and not (result.folder / TENSORS).is_file():
        raise ValueError(
            f"RUN must hold {TENSORS}, got none in {result.folder}; let PEFT save it again with safe_serialization"
        )
    from dsft.methods.stored import shapes

    for file in sorted(result.folder.glob("*.safetensors")):
        shapes(file, "RUN")
    require(result.folder, "RUN", weights_alone=result.run_dir is None)


def _told(result: Result) -> str:
    digest = result.known.get("base_digest", result.known.get("base_fingerprint"))
    return result.base if digest is None else f"{result.base} ({digest[:12]} by its content)"


def _short(paths: Sequence[Path]) -> list[str]:
    """Ends of paths, as short as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    count = 1
    while len({part[-count:] for part in parts}) < len(parts):
        count += 1
    return ["/".join(part[-count:]) for part in parts]


def _tree(path: Path) -> Mapping[str, Any]:
    try:
        tree: Mapping[str, Any] = load_yaml(path)
        tree["quantization"], tree["train"]["precision"], tree["data"].get("format")
    except Exception as error:  # YAML's, OmegaConf's, or a file with something else in it
        raise ValueError(f"RUN must be whole, got {path} damaged; restore it") from error
    return tree


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        content.keys()
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"RUN must be whole, got {path} missing or damaged; restore it") from error
    return content
