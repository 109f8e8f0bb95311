"""The adapter that a run starts from (method.init_from): is it finite, and was it trained on this base model."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsft.folder import base_then_and_now, provenance
from dsft.published import require
from dsft.results import NATIVE, PEFT, TENSORS

NAMED = {NATIVE: "base_model", PEFT: "base_model_name_or_path"}
"""File of an adapter that describes it -> its key with the name of the base."""

DIGEST = re.compile(r"@[0-9a-f]{16}$")
"""The end of the name of a base that was a folder of another machine: the beginning of its digest."""


def known(init_from: str | None) -> Mapping[str, str]:
    """What is known of the run that left the adapter (folder.provenance); nothing of an adapter's folder alone."""
    folder = None if init_from is None else _folder(init_from)
    if folder is None or folder.name != "adapter" or not (folder.parent / "config.yaml").is_file():
        return {}
    return provenance(folder.parent)


def _folder(init_from: str) -> Path:
    given = Path(init_from).expanduser()
    return given / "adapter" if (given / "config.yaml").is_file() else given


def check(init_from: str | None, digests: Mapping[str, str], base: str) -> str | None:
    """Refuse an adapter of another base model, and one with a NaN or Inf; return what a person should know of it.

    digests, base: content (basis.digests_of) and name of this run's base. What does not fit in shape has been refused
    by the method. Raises ValueError.
    """
    if init_from is None:
        return None
    folder = _folder(init_from)
    described = next((folder / name for name in NAMED if (folder / name).is_file()), None)
    if described is None:  # of a format that a package has brought with its method
        return None
    said = _check_base(described, known(init_from), digests, base)
    require(folder, "method.init_from", weights_alone=folder.name != "adapter")
    _check_finite(folder / TENSORS)
    return said


def check_reference(reference: str, digests: Mapping[str, str], base: str) -> str | None:
    """Refuse a reference of another base model, as check does an adapter; one that is no run is none of this."""
    from dsft.objective import BASE, START  # which is made of tensors: composing takes no torch

    if reference in (START, BASE):
        return None
    try:
        folder, run = _folder(reference), known(reference)
        if (folder / "config.json").is_file():
            was, digest = base_then_and_now(run, digests)
            require(folder, "objective.reference", weights_alone=folder.name != "adapter")
            if was is not None and was != digest:
                raise ValueError(
                    f"objective.reference must be a model that was trained from {base} ({digest[:12]} by its content), "
                    f"got one from another ({was[:12]}); take the model that it was trained on"
                )
            return None
        return check(reference, digests, base)
    except ValueError as error:
        raise ValueError(str(error).replace("method.init_from", "objective.reference")) from None


def _check_base(described: Path, run: Mapping[str, str], digests: Mapping[str, str], base: str) -> str | None:
    there = _json(described).get(NAMED[described.name])
    was, digest = base_then_and_now(run, digests)
    if was is not None:
        if was != digest:
            raise ValueError(
                f"method.init_from must be an adapter of this base model, {base} ({digest[:12]} by its content), got "
                f"one of {there} ({was[:12]}); take the model that it was trained on"
            )
        return None
    if not isinstance(there, str):
        return f"method.init_from: whether it is of this base was not checked, {described} names none"
    if not same_name(there, base):
        raise ValueError(
            f"method.init_from must be an adapter of this base model, {base}, got one of {there} by {described}; take "
            f"that model or, if it is the same under another name, set {NAMED[described.name]} there"
        )
    return f"method.init_from: that it is of this base is known by the name alone, {there} in {described}"


def called(base: str, digest: str) -> str:
    """Return the name by which an adapter that is published calls a base that is a folder of this machine."""
    return f"{Path(base).name}@{digest[:16]}"


def same_name(one: str, other: str) -> bool:
    """Return True if two names may be one model's: equal hub ids, or, where one is a folder, equal last parts."""
    names = [_hub_id(DIGEST.sub("", name)) for name in (one, other)]
    if not all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in names):
        names = [name.rpartition("/")[2] for name in names]
    return names[0] == names[1]


def _hub_id(name: str) -> str:
    """The hub id that a folder of the hub's cache is of; any other name without what does not tell it apart."""
    found = re.search(r"models--([^/]+)--([^/]+)/snapshots/", name)
    return (f"{found[1]}/{found[2]}" if found else name.rstrip("/")).lower()


def _check_finite(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            if not bool(opened.get_tensor(name).float().isfinite().all()):
                raise ValueError(
                    f"method.init_from must hold finite numbers, got NaN or Inf in {name} of {file}; take an adapter "
                    "that did not diverge, or leave it out"
                )


def _json(file: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
