"""The verdict of engine/trial.py on a model, remembered in the user's own cache: the same question is asked once."""

import contextlib
import hashlib
import json
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsft_launchers.files import replace_text

from dsft.cache.root import make, others_write, own_root

if TYPE_CHECKING:
    from dsft.comm.world import World
    from dsft.models.family import Family
    from dsft.models.files import ModelFiles

INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
HEADED = "with a head for sequences"
EXAMINING = ("trial", "trial_models", "scored", "head_trial", "recompute")
"""Modules of the engine that examine."""
LIBRARIES = ("torch", "transformers")


def family_of(files: "ModelFiles") -> "Family":
    """How examples of this model are computed, found on a small copy of it; seconds, and once for a configuration.

    Raises ValueError, one line, for a model whose training dsft cannot hold to what its class computes.
    """
    from dsft.engine.trial import examine

    key = _key(files)
    known = _remembered(key)
    if known is None:
        known = examine(files)  # a refusal is not remembered: what is in the way may be this machine's
        _remember(key, known.as_dict())
    return known


def family_on_ranks(files: "ModelFiles", world: "World") -> "Family":
    """Return on every rank the verdict that rank 0 finds. Collective.

    Raises RuntimeError on every rank where the model is refused.
    """
    found: dict[str, Any] = {}
    if world.rank == 0:
        try:
            found = family_of(files).as_dict()
        except ValueError as error:
            found = {"refused": str(error)}
    found = world.gather(found)[0]
    if "refused" in found:
        raise RuntimeError(found["refused"])
    from dsft.models.family import Family

    return Family.from_dict(found)


def _key(files: "ModelFiles") -> str:
    """Digest of what a verdict depends on: configuration, the model's own code, libraries, the code that examines."""
    from dsft.models.files import code_digest

    config = {key: value for key, value in files.config.to_dict().items() if key not in INCIDENTAL}
    own = code_digest(files.folder) if files.trust_remote_code and files.folder is not None else files.revision
    headed = [HEADED] if files.labels else []
    parts = [
        *headed,
        type(files.config).__qualname__,
        config,
        own,
        {name: _version(name) for name in LIBRARIES},
        _code(),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a build that is on the path and not installed
        return "unknown"


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of the modules that build models and examine them."""
    here = Path(__file__).parent
    paths = [
        here / "grouped.py",
        *sorted((here / "models").glob("*.py")),
        *(here / "engine" / f"{name}.py" for name in EXAMINING),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _remembered(key: str) -> "Family | None":
    from dsft.models.family import Family

    place = _place()
    try:
        return None if place is None else Family.from_dict(json.loads((place / f"{key}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):  # never known, or a damaged note: it is examined again
        return None


def _remember(key: str, found: dict[str, Any]) -> None:
    if (place := _place()) is not None:
        with contextlib.suppress(OSError):  # it is examined again the next time
            replace_text(place / f"{key}.json", json.dumps(found, sort_keys=True) + "\n")


def _place() -> Path | None:
    """The folder of verdicts; None where others may write it."""
    place = own_root() / "families"
    try:
        make(place.parent)
        place.mkdir(mode=0o700, exist_ok=True)
        return None if any(others_write(each) for each in (place, place.parent)) else place
    except OSError:
        return None
