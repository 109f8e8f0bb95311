"""What a run that goes on may differ in from the run that made its folder: keys that do not change its numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from dsft.locate import TYPED, locate

FREE = (
    "run_dir", "launcher", "tracker", "strategy", "checkpoint", "resume",
    "train.steps", "train.epochs", "train.max_minutes", "train.micro_batch_tokens", "train.log_samples",
    "train.profile", "train.offload_activations", "train.compile", "train.deterministic", "train.hang_after",
    "optim.in_backward", "quantization.unpack_mib",
)  # fmt: skip
"""Keys that may differ from those that a folder was made with: none of them changes the maths."""

OTHER_PARAMETERS = ("model.", "method.rank", "method.target_modules", "method.trainable", "method.options", "method._")
"""Beginnings of keys that change which parameters learn, or their shapes: resume.allow could not help."""

ONCE = ("anew", "takeover")
"""Keys of the group resume that act for the start they are typed for; a run folder always holds them false."""

SETUP = "launcher.setup"
"""The key whose lines stand in the batch script alone."""

WAY_ANEW = "begin anew with resume.anew=true, which moves what is there to RUN/before-N"
"""The end of a refusal to go on."""


def refuse_others(run_dir: Path, different: Sequence[str]) -> None:
    """Raise ValueError if there are lines in different, which begin with KEY was; the way out names the keys."""
    if different:
        shown = "; ".join(different[:5]) + (f"; and {len(different) - 5} more" if len(different) > 5 else "")
        keys = [line.split(" was ")[0] for line in different]
        allow = f", or go on with it all the same by resume.allow=[{','.join(keys)}]"
        never = any(key.startswith(OTHER_PARAMETERS) for key in keys)
        raise ValueError(
            f"run_dir {run_dir} holds another configuration ({shown}); choose another run_dir{'' if never else allow}"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], allowed: Sequence[str]) -> Iterator[str]:
    """Yield one line per key whose value differs, allowed ones left out."""
    before, after = dict(leaves(old)), dict(leaves(new))
    added = [path for path in after if path not in before and not _came_later(path, new)]
    for path in [*before, *added]:
        if before.get(path) != after.get(path) and not is_free(path, allowed):
            yield f"{path} was {before.get(path)}, is {after.get(path)}"


def _came_later(path: str, tree: Mapping[str, Any]) -> bool:
    """Return True if the key at path has the default of its class: the folder may be older than the key."""
    *parents, name = path.split(".")
    node: Any = tree
    for key in parents:
        node = node.get(key) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping) or "_target_" not in node or name not in node:
        return False
    kind = locate(str(node["_target_"]), TYPED)  # tree was composed and built just now
    field = {each.name: each for each in fields(kind)}.get(name)
    if field is None:
        return False
    made = MISSING if field.default_factory is MISSING else field.default_factory()
    return node[name] in [value for value in (field.default, made) if value is not MISSING]


def leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path (`train.steps`) and the value of every key that holds no further keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def is_free(path: str, allowed: Sequence[str]) -> bool:
    """Return True if path is one of the keys allowed, or below one."""
    return any(path == key or path.startswith(f"{key}.") for key in allowed)


def stored(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration as config.yaml holds it: what was typed for one start is false.

    launcher.setup is left out: it may hold secrets, and no start of a job's ranks needs it.
    """
    resume = {key: False if key in ONCE else value for key, value in resolved["resume"].items()}
    launcher = {key: [] if key == "setup" else value for key, value in resolved["launcher"].items()}
    return {**resolved, "resume": resume, "launcher": launcher}


def typed(overrides: Sequence[str]) -> list[str]:
    """Return the words that were typed, without those that act for one start, and launcher.setup without its value.

    ??? is Hydra's word for what must be given: the command line that goes on is refused until it is.
    """
    kept = [word for word in overrides if word.lstrip("+").split("=")[0] not in [f"resume.{key}" for key in ONCE]]
    return [f"{SETUP}=???" if holds_setup(word) else word for word in kept]


def holds_setup(word: str) -> bool:
    """Return True for an override that sets lines of launcher.setup."""
    return word.lstrip("+~").partition("=")[0].startswith(SETUP)
