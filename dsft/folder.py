"""The run folder: what is written before a run starts, and whether a folder may be used for it."""

import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsft import __version__
from dsft.compose import Composed, dump_yaml, load_yaml

FREE = ("run_dir", "launcher", "tracker", "strategy", "train.steps", "train.micro_batch_tokens")
"""Keys that may differ from those that a folder was made with: none of them changes the maths."""

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "hydra-core", "numpy")


def check(run_dir: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse a folder that cannot be written or holds another configuration; nothing is created."""
    place = run_dir
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"run_dir must be a folder, got {run_dir}: {place} is a file; choose another run_dir")
    try:
        with tempfile.TemporaryFile(dir=place):  # os.access tells nothing to root, nor of a full or odd file system
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"run_dir must be writable, got {run_dir}: {reason} in {place}; choose another") from error
    if (run_dir / "config.yaml").is_file():
        different = list(_differences(load_yaml(run_dir / "config.yaml"), resolved))
        if different:
            shown = "; ".join(different[:5]) + (f"; and {len(different) - 5} more" if len(different) > 5 else "")
            raise ValueError(f"run_dir {run_dir} holds another configuration ({shown}); choose another run_dir")
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise ValueError(f"run_dir must be empty or a run's folder, got {run_dir} with other files; choose another")


def check_length(run_dir: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse another length for a run that is done: it could only be trained anew."""
    old, new = load_yaml(run_dir / "config.yaml")["train"], resolved["train"]
    for key in ("steps", "epochs"):
        if old[key] != new[key]:
            raise ValueError(
                f"run_dir {run_dir} is done with train.{key}={old[key]}, got {new[key]}; choose another run_dir"
            )


def create(run_dir: Path, composed: Composed, plan: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write config.yaml, overrides.yaml, plan.json and provenance.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    dump_yaml(composed.resolved, run_dir / "config.yaml")
    dump_yaml(list(composed.overrides), run_dir / "overrides.yaml")
    (run_dir / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    provenance = {
        "dsft": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "host": platform.node(),
        "packages": dict(_versions()),
        "choices": [vars(choice) for choice in composed.choices],
        "job": {key: value for key, value in os.environ.items() if key in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID")},
        **digests,
    }
    (run_dir / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


def state(run_dir: Path) -> dict[str, Any]:
    """The run's status.json, or {} if it never started."""
    path = run_dir / "status.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """One line per key whose value differs, free keys left out."""
    if path in FREE:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path} was {old}, is {new}"


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "absent"


def _commit() -> str | None:
    """The commit of the checkout that dsft runs from, with + if it has changes; None in an installed wheel."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") or None
