"""The run folder: what is written before a run starts, and whether a folder may be used for it."""

import contextlib
import hashlib
import json
import os
import platform
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsft_launchers.files import replace_text

from dsft import __version__, earlier, installed, published
from dsft.checkpoint import manifest
from dsft.checkpoint.manifest import Identity
from dsft.checkpoint.store import Store
from dsft.compose import Composed, dump_yaml, load_yaml
from dsft.door import at_the_door
from dsft.door import check_place as check_place
from dsft.earlier import begin_anew as begin_anew
from dsft.earlier import set_records_aside as set_records_aside
from dsft.likeness import FREE, WAY_ANEW, differences, is_free, leaves, refuse_others, stored, typed
from dsft.paths import expand
from dsft.privacy import private_input
from dsft.wording import suggest


def check(run_dir: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse a folder that cannot be written or holds another configuration; nothing is created."""
    check_place(run_dir)
    paths = [path for path, _ in leaves(resolved)]
    for key in resolved["resume"]["allow"]:
        if key not in ("model", "data") and not any(is_free(path, [key]) for path in paths):
            raise ValueError(f"resume.allow must hold keys of the configuration, got {key}{suggest(key, paths)}")
    if not (run_dir / "config.yaml").is_file():
        if run_dir.is_dir() and any(_foreign(each) for each in run_dir.iterdir()):
            raise ValueError(f"run_dir must be empty or a run's folder, got {run_dir} with other files; choose another")
    elif not anew(run_dir, resolved):
        allowed = (*FREE, *resolved["resume"]["allow"])
        refuse_others(run_dir, list(differences(_config(run_dir), resolved, allowed)))


def anew(run_dir: Path, resolved: Mapping[str, Any]) -> bool:
    """Return True if the run in run_dir is to be moved: resume.anew=true, or such a start was killed meanwhile."""
    return bool(resolved["resume"].get("anew")) or earlier.unfinished(run_dir)


def _foreign(path: Path) -> bool:
    """Return False for what a start leaves that is killed before it has written config.yaml."""
    if path.name == "checkpoints" and path.is_dir():
        return any(not each.name.startswith(("lease-", ".")) for each in path.iterdir())
    return not re.fullmatch(r"\.config\.yaml\.\d+", path.name)


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
    old = {} if anew(run_dir, resolved) else known(run_dir)
    now = [("model", *base_then_and_now(old, digests), "content")]
    if _by_tokens(old, digests):
        same = old.get("data_digest") == digests["data_digest"]
        by = "tokens" + ", though rows and template are the same: jinja or transformers is another one" * same
        now.append(("data", old.get("tokens_digest", old.get("data_digest")), digests["tokens_digest"], by))
    else:
        now.append(("data", old.get("data_digest"), digests["data_digest"], "content"))
    different = [
        f"{group} was {was[:12]}, is {digest[:12]} by its {by}"
        for group, was, digest, by in now
        if was is not None and was != digest and group not in resolved["resume"]["allow"]
    ]
    refuse_others(run_dir, different)


def base_then_and_now(old: Mapping[str, str], digests: Mapping[str, str]) -> tuple[str | None, str]:
    """The base of a run and the one that is there: their base_digest where both are known, else their fingerprints."""
    key = "base_digest" if "base_digest" in old and "base_digest" in digests else "base_fingerprint"
    return old.get(key), digests[key]


def _by_tokens(old: Mapping[str, str], digests: Mapping[str, str]) -> bool:
    """True if a run's data are known by their tokens; those that older dsft began are known by their inputs.

    old: of known. A manifest holds one digest, and does not say which.
    """
    return "tokens_digest" in old or not old or old.get("data_digest") == digests["tokens_digest"]


def check_length(run_dir: Path, resolved: Mapping[str, Any]) -> bool:
    """True if the run is done and as long as asked for: its result is there, published.check reads its content.

    Refuses a run that is shorter than what was trained already, and one that has nothing to go on from.
    """
    if not (run_dir / "config.yaml").is_file():
        return False
    old, new, status = _config(run_dir), resolved, state(run_dir)
    lengths = [[tree["train"][key] for key in ("steps", "epochs")] for tree in (old, new)]
    there = Store(run_dir).newest_first()
    if new["train"]["steps"] is not None:
        check_steps(run_dir, new["train"]["steps"], "train.steps")
    if status.get("state") == "done" and lengths[0] == lengths[1]:
        published.check(run_dir, contents=False)
        return True
    if not there and (status.get("state") == "done" or status.get("checkpoint") is not None):
        raise ValueError(
            f"run_dir {run_dir} has trained {status['step']} steps and holds no checkpoint to go on from; put its "
            f"checkpoints back, choose another run_dir, or {WAY_ANEW}"
        )
    _refuse_newer(run_dir, there)
    return False


def goes_on(run_dir: Path) -> bool:
    """Return True if the run has a result or a checkpoint: else it begins again at step 1."""
    return bool(Store(run_dir).newest_first()) or state(run_dir).get("state") == "done"


def check_steps(run_dir: Path, steps: int, key: str) -> None:
    """Refuse a run that goes on and is shorter than what was trained already. key: what was set to so many steps."""
    trained = state(run_dir).get("step", 0)
    if goes_on(run_dir) and steps < trained:
        least = f"be at least {trained}" if key == "train.steps" else f"give at least {trained} steps"
        raise ValueError(
            f"{key} must {least}, the steps of {run_dir} so far, got {steps}; raise it, choose another run_dir, or "
            f"{WAY_ANEW}"
        )


def _refuse_newer(run_dir: Path, newest_first: Sequence[Path]) -> None:
    """Refuse a run whose newest checkpoint was made by a later dsft, or may not be read by this user."""
    for checkpoint in newest_first:
        try:
            manifest.read(checkpoint)
        except manifest.NewerError as error:
            raise ValueError(
                f"run_dir {run_dir} must be gone on with by the dsft that wrote it: {error}; take that one, choose "
                f"another run_dir, or {WAY_ANEW}"
            ) from error
        except manifest.DamagedError:  # it is set aside by the ranks, which read all of it
            continue
        except OSError as error:
            raise ValueError(
                f"run_dir {run_dir} must hold checkpoints that can be read, got {checkpoint.name}: {error.strerror}; "
                "give this user the right to, or choose another run_dir"
            ) from error
        return


def notes(run_dir: Path, resolved: Mapping[str, Any]) -> Iterator[str]:
    """What a person should know before this folder's run begins or goes on."""
    if not (run_dir / "config.yaml").is_file():
        if private := private_input(resolved):
            yield f"the run folder is for its owner alone (mode 0700), as not every user may read {private}"
        return
    if anew(run_dir, resolved):
        if moved := ", ".join(earlier.movable(run_dir)):
            yield f"resume.anew=true: the run begins at step 1; {moved} move to {earlier.target(run_dir)}"
        return
    old = _config(run_dir)
    schedule = resolved["optim"]["schedule"]
    if any(old["train"][key] != resolved["train"][key] for key in ("steps", "epochs")) and schedule != "constant":
        yield f"the {schedule} schedule is computed anew for the new length"
    if not known(run_dir):
        yield "provenance.json is missing: whether base model and data are still the same could not be checked"
    if state(run_dir) and not any(Store(run_dir).newest_first()):
        yield "no checkpoint to go on from: the run begins again at step 1"


def create(run_dir: Path, composed: Composed, plan: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write config.yaml, overrides.yaml, plan.json and provenance.json; what resume.anew moves is moved before."""
    with at_the_door(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "config.yaml").is_file() and private_input(composed.resolved):
            run_dir.chmod(0o700)
        if anew(run_dir, composed.resolved):
            earlier.begin_anew(run_dir)
        _write(run_dir, composed, plan, digests)


def _write(run_dir: Path, composed: Composed, plan: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    old = known(run_dir)
    kept = {key: value for key, value in digests.items() if key != "tokens_digest" or _by_tokens(old, digests)}
    content = {
        "run": old.get("run", uuid.uuid4().hex),
        "dsft": __version__,
        "commit": installed.commit(),
        "python": platform.python_version(),
        "host": platform.node(),
        "started": composed.start.kind,
        "packages": installed.versions(),
        "choices": [vars(choice) for choice in composed.choices],
        "job": {key: value for key, value in os.environ.items() if key in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID")},
        **kept,
    }
    replace_text(run_dir / "config.yaml", dump_yaml(stored(composed.resolved)))  # first: it makes the folder a run's
    replace_text(run_dir / "overrides.yaml", dump_yaml(typed(composed.overrides)))
    replace_text(run_dir / "plan.json", json.dumps(plan, indent=1) + "\n")
    replace_text(run_dir / "provenance.json", json.dumps(content, indent=1) + "\n")


def known(run_dir: Path) -> dict[str, str]:
    """The run's id and the digests as they were: by provenance.json, else by the newest manifest; {} if nowhere."""
    found = provenance(run_dir)
    for checkpoint in [] if found else Store(run_dir).newest_first():
        with contextlib.suppress(manifest.DamagedError, manifest.NewerError, OSError):
            who = manifest.read(checkpoint).identity
            whole = {} if who.base_digest is None else {"base_digest": who.base_digest}
            return {"run": who.run, "base_fingerprint": who.base, "data_digest": who.data, **whole}
    return found


def _config(run_dir: Path) -> dict[str, Any]:
    """The configuration that the folder was made with."""
    path = run_dir / "config.yaml"
    try:
        tree = expand(load_yaml(path))  # an older dsft left a ~ in it
        return {**tree, "train": {**tree["train"]}}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give this user the right to") from error
    except Exception as error:  # YAML's, OmegaConf's, or a file with something else in it
        raise ValueError(f"{path} is damaged; restore it, choose another run_dir, or {WAY_ANEW}") from error


def planned(run_dir: Path) -> dict[str, Any]:
    """plan.json of a run folder; empty if it has none yet."""
    return _read_json(run_dir / "plan.json")


def provenance(run_dir: Path) -> dict[str, Any]:
    """The run's provenance.json, or {} if it was never made."""
    found = _read_json(run_dir / "provenance.json")
    if "base_digest" in found and "base_fingerprint" not in found:  # an older dsft called the fingerprint so
        found["base_fingerprint"] = found.pop("base_digest")
    return found


def note_base(run_dir: Path, digest: str) -> None:
    """Add base_digest to provenance.json, once all bytes of the base have been read."""
    content = {**provenance(run_dir), "base_digest": digest}
    replace_text(run_dir / "provenance.json", json.dumps(content, indent=1) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        content.keys()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give this user the right to") from error
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged; restore it; remove it only if nothing in it need be compared any more"
        ) from error
    return content


def identity(run_dir: Path, resolved: Mapping[str, Any]) -> Identity:
    """What this run's checkpoints belong to; config is the SHA-256 of all keys that decide its numbers."""
    decisive = {path: value for path, value in leaves(resolved) if not is_free(path, FREE)}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()
    found = provenance(run_dir)
    data, base = found["tokens_digest" if "tokens_digest" in found else "data_digest"], found["base_fingerprint"]
    return Identity(run=found["run"], config=digest, base=base, data=data, base_digest=found.get("base_digest"))


def state(run_dir: Path) -> dict[str, Any]:
    """The run's status.json, or {} if it never started."""
    path = run_dir / "status.json"
    content = _read_json(path)
    if content and not {"state", "step"} <= content.keys():
        raise ValueError(f"{path} is damaged; remove it, the run goes on without")
    return content
