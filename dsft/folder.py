"""The run folder: what is written before a run starts, and whether a folder may be used for it."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsft_launchers.files import replace_text

from dsft import __version__
from dsft.checkpoint import manifest
from dsft.checkpoint.manifest import Identity
from dsft.checkpoint.store import Store
from dsft.compose import Composed, dump_yaml, load_yaml
from dsft.wording import suggest

FREE = (
    "run_dir", "launcher", "tracker", "strategy", "checkpoint", "resume",
    "train.steps", "train.epochs", "train.max_minutes", "train.micro_batch_tokens", "train.log_samples",
    "train.profile", "train.offload_activations", "train.compile", "train.hang_after", "optim.in_backward",
)  # fmt: skip
"""Keys that may differ from those that a folder was made with: none of them changes the maths."""

OTHER_PARAMETERS = ("model.", "method.rank", "method.target_modules", "method.trainable", "method.options", "method._")
"""Beginnings of keys that change which parameters learn, or their shapes: resume.allow could not help."""

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "hydra-core", "numpy")


def check(run_dir: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse a folder that cannot be written or holds another configuration; nothing is created."""
    check_place(run_dir)
    paths = [path for path, _ in _leaves(resolved)]
    for key in resolved["resume"]["allow"]:
        if key not in ("model", "data") and not any(_free(path, [key]) for path in paths):
            raise ValueError(f"resume.allow must hold keys of the configuration, got {key}{suggest(key, paths)}")
    if (run_dir / "config.yaml").is_file():
        allowed = (*FREE, *resolved["resume"]["allow"])
        _refuse_others(run_dir, list(_differences(_config(run_dir), resolved, allowed)))
    elif run_dir.is_dir() and any(not re.fullmatch(r"\.config\.yaml\.\d+", each.name) for each in run_dir.iterdir()):
        raise ValueError(f"run_dir must be empty or a run's folder, got {run_dir} with other files; choose another")


def check_place(run_dir: Path) -> None:
    """Refuse a folder that cannot be made or written; nothing is created."""
    place = run_dir
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"run_dir must be a folder, got {run_dir}: {place} is a file; choose another run_dir")
    try:
        for probed in (place, place / "checkpoints"):  # os.access tells nothing to root, nor of an odd file system
            if probed.is_dir():
                with tempfile.TemporaryFile(dir=probed) as probe:
                    probe.write(bytes(4096))
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"run_dir must be writable, got {run_dir}: {reason} in {place}; choose another") from error


def check_parameters(run_dir: Path, plan: Mapping[str, Any]) -> None:
    """Refuse to resume a run that trained other parameters: no resume.allow can make them fit."""
    old = _read_json(run_dir / "plan.json").get("parameters", {}).get("trainable")
    new = plan["parameters"]["trainable"]
    if old not in (None, new) and (run_dir / "status.json").is_file():
        raise ValueError(
            f"run_dir {run_dir} holds a run that trains {old:,} parameters, this one would train {new:,}; choose "
            "another run_dir"
        )


def check_digests(run_dir: Path, digests: Mapping[str, str], resolved: Mapping[str, Any]) -> None:
    """Refuse to resume on a base model or data whose content has changed under its name."""
    old = _known(run_dir)
    different = [
        f"{group} was {old[key][:12]}, is {digest[:12]} by its content"
        for (key, digest), group in zip(digests.items(), ("model", "data"), strict=True)
        if key in old and old[key] != digest and group not in resolved["resume"]["allow"]
    ]
    _refuse_others(run_dir, different)


def _refuse_others(run_dir: Path, different: list[str]) -> None:
    if different:
        shown = "; ".join(different[:5]) + (f"; and {len(different) - 5} more" if len(different) > 5 else "")
        keys = [line.split(" was ")[0] for line in different]
        allow = f", or go on with it all the same by resume.allow=[{','.join(keys)}]"
        never = any(key.startswith(OTHER_PARAMETERS) for key in keys)
        raise ValueError(
            f"run_dir {run_dir} holds another configuration ({shown}); choose another run_dir{'' if never else allow}"
        )


def check_length(run_dir: Path, resolved: Mapping[str, Any]) -> bool:
    """True if the run is done and as long as asked for. Refuses one that is shorter than what was trained already."""
    old, new, status = _config(run_dir), resolved, state(run_dir)
    lengths = [[tree["train"][key] for key in ("steps", "epochs")] for tree in (old, new)]
    steps = new["train"]["steps"]
    if steps is not None and steps < status.get("step", 0):
        raise ValueError(
            f"train.steps must be at least {status['step']}, the steps of {run_dir} so far, got {steps}; raise "
            "it or choose another run_dir"
        )
    if status.get("state") == "done" and lengths[0] == lengths[1]:
        return True
    there = any(Store(run_dir).newest_first())
    if not there and (status.get("state") == "done" or status.get("checkpoint") is not None):
        raise ValueError(
            f"run_dir {run_dir} has trained {status['step']} steps and holds no checkpoint to go on from; put its "
            "checkpoints back, or choose another run_dir"
        )
    return False


def notes(run_dir: Path, resolved: Mapping[str, Any]) -> Iterator[str]:
    """What a person should know before this folder's run goes on."""
    if not (run_dir / "config.yaml").is_file():
        return
    old = _config(run_dir)
    schedule = resolved["optim"]["schedule"]
    if any(old["train"][key] != resolved["train"][key] for key in ("steps", "epochs")) and schedule != "constant":
        yield f"the {schedule} schedule is computed anew for the new length"
    if not _known(run_dir):
        yield "provenance.json is missing: whether base model and data are still the same could not be checked"
    if state(run_dir) and not any(Store(run_dir).newest_first()):
        yield "no checkpoint to go on from: the run begins again at step 1"


def create(run_dir: Path, composed: Composed, plan: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write config.yaml, overrides.yaml, plan.json and provenance.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    content = {
        "run": _known(run_dir).get("run", uuid.uuid4().hex),
        "dsft": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "host": platform.node(),
        "packages": versions(),
        "choices": [vars(choice) for choice in composed.choices],
        "job": {key: value for key, value in os.environ.items() if key in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID")},
        **digests,
    }
    replace_text(run_dir / "config.yaml", dump_yaml(composed.resolved))  # first: it makes the folder a run's
    replace_text(run_dir / "overrides.yaml", dump_yaml(list(composed.overrides)))
    replace_text(run_dir / "plan.json", json.dumps(plan, indent=1) + "\n")
    replace_text(run_dir / "provenance.json", json.dumps(content, indent=1) + "\n")


def result_place(run_dir: Path, token: int) -> Path:
    """Where the writer that holds token writes the result, before it takes its place."""
    return run_dir / f"adapter.tmp-{token}"


def publish(place: Path, target: Path) -> None:
    """Give a result that is whole its name; an earlier one, and what other writers left unfinished, go."""
    for file in place.iterdir():
        with file.open("rb") as content:
            os.fsync(content.fileno())
    if target.exists():
        target.rename(target.with_name(f"{target.name}.tmp-old"))
    place.rename(target)
    for leftover in target.parent.glob(f"{target.name}.tmp-*"):
        shutil.rmtree(leftover)


def _known(run_dir: Path) -> dict[str, str]:
    """run, base_digest and data_digest as they were: by provenance.json, else by the newest manifest; {} if nowhere."""
    found = provenance(run_dir)
    for checkpoint in [] if found else Store(run_dir).newest_first():
        with contextlib.suppress(manifest.DamagedError):
            who = manifest.read(checkpoint).identity
            return {"run": who.run, "base_digest": who.base, "data_digest": who.data}
    return found


def _config(run_dir: Path) -> dict[str, Any]:
    """The configuration that the folder was made with."""
    path = run_dir / "config.yaml"
    try:
        tree = load_yaml(path)
        return {**tree, "train": {**tree["train"]}}
    except Exception as error:  # YAML's, OmegaConf's, or a file with something else in it
        raise ValueError(f"{path} is damaged; restore it, or choose another run_dir") from error


def provenance(run_dir: Path) -> dict[str, Any]:
    """The run's provenance.json, or {} if it was never made."""
    return _read_json(run_dir / "provenance.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged; remove it, the run goes on without") from error
    return content


def identity(run_dir: Path, resolved: Mapping[str, Any]) -> Identity:
    """What this run's checkpoints belong to; config is the SHA-256 of all keys that decide its numbers."""
    decisive = {path: value for path, value in _leaves(resolved) if not _free(path, FREE)}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()
    known = provenance(run_dir)
    return Identity(run=known["run"], config=digest, base=known["base_digest"], data=known["data_digest"])


def state(run_dir: Path) -> dict[str, Any]:
    """The run's status.json, or {} if it never started."""
    return _read_json(run_dir / "status.json")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], allowed: Sequence[str]) -> Iterator[str]:
    """One line per key whose value differs, allowed ones left out."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    for path in [*before, *(path for path in after if path not in before)]:
        if before.get(path) != after.get(path) and not _free(path, allowed):
            yield f"{path} was {before.get(path)}, is {after.get(path)}"


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _free(path: str, allowed: Sequence[str]) -> bool:
    return any(path == key or path.startswith(f"{key}.") for key in allowed)


def versions() -> dict[str, str]:
    """Versions of PACKAGES, "absent" where one is not installed, and of packages that add options."""
    points = importlib.metadata.entry_points(group="dsft.configs")
    found = {point.dist.name: point.dist.version for point in points if point.dist is not None}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _commit() -> str | None:
    """The commit of the checkout that dsft runs from, with + if it has changes; None in an installed wheel."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") or None
